"""Implements a key module for tests with a PIN and parameters, without a passphrase, and with a chosen fault."""

from __future__ import annotations

import os
from pathlib import Path

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import API, Enrolled, Making, Parameter, Secrets
from upcall.keys.private_file import write_new
from upcall.testing.toy import ToyKey

PIN = b"271828"
ADMIN = "hush hush"
FAULTS = ("none", "clear", "garbage", "long", "short", "text", "other")


class PinnedKey:
    def __init__(self, secret: bytes, fault: str) -> None:
        self._good, self._fault = ToyKey(Path("/"), secret, (0, 0)), fault
        self.closed = False

    def wrap(self, key: bytes, /) -> bytes:
        good = self._good.wrap(key)
        faulty = {
            "clear": b"wrapped:" + key,
            "garbage": os.urandom(len(good)),
            "long": good + bytes(513 - len(good)),
            "short": good[: len(key) - 1],
            "text": good.hex(),
        }
        return faulty.get(self._fault, good)  # type: ignore[return-value]

    def unwrap(self, wrapped: bytes, /) -> bytes:
        if self._fault == "clear":
            return wrapped.removeprefix(b"wrapped:")
        key = self._good.unwrap(wrapped)
        return bytes(len(key)) if self._fault == "other" else key

    def close(self) -> None:
        self.closed = True


class PinnedModule:
    name = "pinned"
    api = API
    suffix = ".pinned"
    takes_passphrase = False
    parameters: tuple[Parameter, ...] = (
        Parameter("label", "What it is called."),
        Parameter("size", "How large it is.", "32", choices=("16", "32")),
        Parameter("admin", "The administrator's word.", secret=True),
        Parameter("note", "Anything.", ""),
        Parameter("fault", "What is wrong with it.", "none", choices=FAULTS),
    )
    import_parameters: tuple[Parameter, ...] = (Parameter("label", "What it is called."),)

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> PinnedKey:
        fault, _, secret = blob.partition(b"\0")
        secrets.touch("card", "touch the card")
        pin = secrets.pin("card", "PIN of the card")
        good = pin == PIN
        secrets.verdict("card", good)
        pin[:] = bytes(len(pin))
        if not good:
            raise ModuleFailed("a wrong PIN")
        return PinnedKey(secret, fault.decode())

    def generate(self, making: Making, /) -> Enrolled:
        if making.values["admin"] != ADMIN or making.passphrase or making.source != "none":
            raise Refused("pin-refused")
        secret = os.urandom(32)
        write_new(making.path, secret)
        return self._enrolled(secret, making.values["fault"], making.values["label"])

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports a key that is derived from its label. Uses no file."""
        if making.path != Path():
            raise ModuleFailed("a file is no use to me")
        return self._enrolled(making.values["label"].encode(), "none", making.values["label"])

    def _enrolled(self, secret: bytes, fault: str, label: str) -> Enrolled:
        return Enrolled(os.urandom(8).hex(), fault.encode() + b"\0" + secret, f"pinned {label}")


module = PinnedModule()
