"""The contract of key modules, kept by x25519."""

from __future__ import annotations

from pathlib import Path

import pytest
from upcall_x25519 import FORMS, module

from upcall.testing.contract import KeyModuleContract, Made


class TestX25519(KeyModuleContract):
    module = module

    @pytest.fixture(params=FORMS)
    def made(self, tmp_path: Path, request: pytest.FixtureRequest) -> Made:
        self.values = {"cipher": request.param}
        return self.make(tmp_path)


class TestX25519WithoutPassphrase(KeyModuleContract):
    module = module
    passphrase = b""
