"""Implements a toy key module for tests that fails if the `keyring` library or its dependencies are loaded."""

from __future__ import annotations

import sys

from upcall.core.errors import ModuleFailed
from upcall.keymodule import Secrets
from upcall.testing.toy import ToyKey, ToyModule

HEAVY = {"keyring", "jaraco", "secretstorage", "upcall.keys.keyring_backend", "upcall.keys.keyring_choice"}


class _Lean(ToyModule):
    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> ToyKey:
        if "upcall.keys.passphrase" in sys.modules:
            raise ModuleFailed("the daemon has already fetched a passphrase")
        key = super().open(signature, blob, secrets)
        if "upcall.keys.passphrase" not in sys.modules:
            raise ModuleFailed("the daemon has fetched no passphrase")
        if loaded := HEAVY & sys.modules.keys():
            raise ModuleFailed(f"the daemon has loaded {', '.join(sorted(loaded))}")
        return key


LEAN = _Lean()
