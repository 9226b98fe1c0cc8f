"""The contract suite, kept by the toy key. What it says of broken modules: test_testing_checks.py."""

from __future__ import annotations

from pathlib import Path

from upcall.testing.contract import KeyModuleContract, Made
from upcall.testing.toy import ToyModule, make_toy_key


class TestToy(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        file = tmp_path / "toy.key"
        return Made(ToyModule(), *make_toy_key(file, b"open sesame"), b"open sesame", file)


class TestToyWithoutPassphrase(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        file = tmp_path / "toy.key"
        return Made(ToyModule(), *make_toy_key(file), file=file)
