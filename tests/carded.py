"""Implements a key module for tests whose keys are in a simulated token, which counts PINs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from upcall.core.errors import ModuleFailed
from upcall.keymodule import API, Secrets
from upcall.testing.toy import ToyKey

PIN = b"271828"


def make_card_key(tries: Path, label: str, token: str = "card", manner: str = "") -> tuple[str, bytes]:
    """Returns a key's signature and blob. `tries`: a file to which the token writes the result of each PIN. `manner`:
    see `_Card.open`."""
    signature = hashlib.sha256(f"{tries} {label} {token}".encode()).hexdigest()[:16]
    return signature, "\0".join((os.fspath(tries), token, label, manner)).encode()


class _Card:
    name = "card"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> ToyKey:
        """`manner`: "mute" gives no verdict, "again" asks again after a wrong PIN, "touch" asks for a touch first."""
        tries, token, label, manner = blob.decode().split("\0")
        if manner == "touch":
            secrets.touch(token, f"Touch the {token}")
        while not _tried(Path(tries), token, secrets, manner):
            if manner != "again":
                raise ModuleFailed("a wrong PIN")
        return ToyKey(Path("/"), label.encode(), (0, 0))


def _tried(tries: Path, token: str, secrets: Secrets, manner: str) -> bool:
    pin = secrets.pin(token, f"PIN of the {token}")
    good = bytes(pin) == PIN
    with tries.open("a") as file:
        file.write("good\n" if good else "wrong\n")
    pin[:] = bytes(len(pin))
    if manner == "mute":
        raise ModuleFailed("the token was taken out")
    secrets.verdict(token, good)
    return good


CARD = _Card()
