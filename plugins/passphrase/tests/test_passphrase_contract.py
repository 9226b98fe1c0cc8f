"""The contract of key modules, kept by passphrase."""

from __future__ import annotations

from upcall_passphrase import module

from upcall.testing.contract import KeyModuleContract


class TestPassphrase(KeyModuleContract):
    module = module
    values = {"memory": "64", "passes": "1"}
