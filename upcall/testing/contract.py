"""Checks a key module against the contract, as a pytest class to inherit:

class TestMyModule(KeyModuleContract):
    module = module

This suffices for a module that makes keys: the checks of `upcall.testing.checks` run on new keys. `values`: parameters
without a default. Override `make` for a module that makes no keys, or whose keys need more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from upcall.core.errors import ModuleFailed
from upcall.keymodule import KeyHandle, KeyMaker, KeyModule
from upcall.keys import plugins as modules
from upcall.testing import subject
from upcall.testing.checks import CHECKS
from upcall.testing.subject import Check, ContractBroken, Made, NotApplicable, Subject, make_key, run_check

__all__ = ["ContractBroken", "KeyModuleContract", "Made", "open_key"]


class KeyModuleContract:
    """Runs one test, `test_contract`, for each check."""

    module: KeyModule
    values: Mapping[str, str] = {}  # of parameters without a default, by name
    passphrase = subject.PASSPHRASE
    pin = subject.PIN
    patience = subject.PATIENCE  # seconds for one check
    without: Mapping[str, str] = {}  # check to skip -> reason

    def make(self, tmp_path: Path) -> Made:
        """Returns a new key on each call. Override it if the module makes no keys."""
        module = self.module
        if not isinstance(module, KeyMaker):
            raise NotImplementedError("the module makes no keys: `make` must say where one is")
        return make_key(module, module, tmp_path, self.values, self.passphrase, self.pin)

    def token_taken_out(self, made: Made) -> AbstractContextManager[None]:
        """Returns a context in which the key's file or token is not there. Override it for tokens; default: the
        file."""
        return subject.moved_away(made)

    @pytest.fixture
    def made(self, tmp_path: Path) -> Made:
        return self.make(tmp_path)

    @pytest.fixture
    def key(self, made: Made) -> KeyHandle:
        return open_key(made)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, check: Check, made: Made, tmp_path_factory: pytest.TempPathFactory) -> None:
        if check.__name__ in self.without:
            pytest.skip(self.without[check.__name__])
        folder = tmp_path_factory.mktemp("contract")
        made = made._replace(spec=made.spec or _spec_of(made.module))
        try:
            run_check(check, Subject(made, folder, self.token_taken_out, self.patience))
        except NotApplicable as why:
            pytest.skip(str(why))


def _spec_of(module: KeyModule) -> str:
    """Returns "package:attribute" of an installed module; "" if it is not installed."""
    found = modules.available().get(module.name)
    try:
        return found.spec if found is not None and modules.load(found.spec) is module else ""
    except ModuleFailed:
        return ""


def open_key(made: Made) -> KeyHandle:
    """Opens a key with all secrets that it needs. The caller closes it."""
    return made.module.open(made.signature, made.blob, made.told())
