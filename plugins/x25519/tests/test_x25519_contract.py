"""The contract of key modules, kept by x25519."""

from __future__ import annotations

from pathlib import Path

import pytest
from upcall_x25519 import FORMS, module

from upcall.keymodule import Limits, Making
from upcall.testing.contract import KeyModuleContract, Made
from upcall.testing.secrets import Told


def made(path: Path, passphrase: bytes, cipher: str = "aes-256-gcm") -> Made:
    source = "ask" if passphrase else "none"
    key = module.generate(Making(path, {"cipher": cipher}, bytearray(passphrase), source, Limits(), Told()))
    return Made(module, key.signature, key.blob, passphrase, path)


class TestX25519(KeyModuleContract):
    @pytest.fixture(params=FORMS)
    def made(self, tmp_path: Path, request: pytest.FixtureRequest) -> Made:
        return made(tmp_path / "key.pem", b"correct horse", request.param)


class TestX25519WithoutPassphrase(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        return made(tmp_path / "key.pem", b"")
