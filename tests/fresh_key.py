"""A key file of its own for each test: the user keyring is one for all tests that run at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from upcall_rsa import module

from upcall.keymodule import Limits, Making
from upcall.testing.secrets import GivenSecrets

WORD = "a word of old"


class FreshKey(NamedTuple):
    path: Path
    signature: str


def fresh_key(path: Path) -> FreshKey:
    """Makes an RSA key file, as ecryptfs-utils has them, with the passphrase WORD."""
    making = Making(path, {"bits": "2048"}, bytearray(WORD.encode()), "ask", Limits(), GivenSecrets())
    return FreshKey(path, module.generate(making).signature)
