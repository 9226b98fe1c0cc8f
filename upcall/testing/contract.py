"""The contract of key modules, as a pytest class to inherit:

class TestMyModule(KeyModuleContract):
    module = module

That is all for a module that makes keys: the checks of `upcall.testing.checks` are made on new ones. `values` has the
parameters that have no default. A module that makes none, or keys that need more, say so in `make`.
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
    """What every key module must do: one test, `test_contract`, for each check."""

    module: KeyModule
    values: Mapping[str, str] = {}  # by the parameters' names
    passphrase = subject.PASSPHRASE
    pin = subject.PIN
    patience = subject.PATIENCE  # seconds for one check
    without: Mapping[str, str] = {}  # names of checks that are left out, and why

    def make(self, tmp_path: Path) -> Made:
        """A new key each time."""
        module = self.module
        if not isinstance(module, KeyMaker):
            raise NotImplementedError("the module makes no keys: `make` must say where one is")
        return make_key(module, module, tmp_path, self.values, self.passphrase, self.pin)

    def token_taken_out(self, made: Made) -> AbstractContextManager[None]:
        """Takes away what the key is in, and puts it back at the end. A file, if nothing else is said here."""
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
    """Of an installed module, what its entry point says; "" of one that is not installed."""
    found = modules.available().get(module.name)
    try:
        return found.spec if found is not None and modules.load(found.spec) is module else ""
    except ModuleFailed:
        return ""


def open_key(made: Made) -> KeyHandle:
    """The key, opened with all that it asks for."""
    return made.module.open(made.signature, made.blob, made.told())
