"""The contract of key modules, kept by openssl."""

from __future__ import annotations

from upcall_rsa import module

from upcall.testing.contract import KeyModuleContract


class TestOpenssl(KeyModuleContract):
    module = module
    values = {"bits": "2048"}  # the fastest to make


class TestOpensslWithoutPassphrase(TestOpenssl):
    passphrase = b""
