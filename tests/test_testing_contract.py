"""The contract suite, kept by the toy key; and what it says of modules that do not keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upcall.testing.contract import KeyModuleContract, Made, open_key
from upcall.testing.toy import ToyKey, ToyModule, make_toy_key


class TestToy(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        file = tmp_path / "toy.key"
        return Made(ToyModule(), *make_toy_key(file, b"open sesame"), b"open sesame", file)


class TestToyWithoutPassphrase(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        file = tmp_path / "toy.key"
        return Made(ToyModule(), *make_toy_key(file), file=file)


class Lazy(ToyKey):
    """Wraps nothing."""

    def wrap(self, key: bytes, /) -> bytes:
        return key

    def unwrap(self, wrapped: bytes, /) -> bytes:
        return wrapped

    def stale(self) -> bool:
        return False


def test_the_contract_catches_a_module_that_wraps_nothing(tmp_path: Path) -> None:
    made = TestToyWithoutPassphrase().make(tmp_path)
    suite: Any = KeyModuleContract()
    lazy = open_key(made)
    lazy.__class__ = Lazy
    with pytest.raises(AssertionError):
        suite.test_the_wrapped_key_does_not_hold_the_clear_one(lazy)
    with pytest.raises(pytest.fail.Exception):
        suite.test_garbage_is_module_failed_and_nothing_else(lazy)
    with pytest.raises(AssertionError):
        suite.test_it_is_stale_once_its_file_has_changed(made, lazy)
