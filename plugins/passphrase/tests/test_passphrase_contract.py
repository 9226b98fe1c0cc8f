"""The contract of key modules, kept by passphrase."""

from __future__ import annotations

from pathlib import Path

from upcall_passphrase import module

from upcall.keymodule import Limits, Making
from upcall.testing.contract import KeyModuleContract, Made
from upcall.testing.secrets import Told


class TestPassphrase(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        values, word = {"memory": "64", "passes": "1"}, b"correct horse"
        key = module.generate(Making(tmp_path / "key", values, bytearray(word), "ask", Limits(), Told()))
        return Made(module, key.signature, key.blob, word)
