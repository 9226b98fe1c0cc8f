"""The contract of key modules, kept in the test's own process and in one of the module's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

from upcall_pkcs11 import module
from upcall_pkcs11.softhsm import PIN, SoftHsm, making, missing

from upcall.testing.contract import KeyModuleContract, Made

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
labels = (f"key{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of keys in one token, its PIN in a file. One for all: a library in use does not look for tokens."""
    hsm = SoftHsm(tmp_path_factory.mktemp("softhsm"))
    hsm.add("one")
    pin = hsm.folder / "pin"
    pin.touch(0o600)
    pin.write_bytes(PIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(hsm.config))
        yield f"{hsm.uri('one', ';object={}')}&pin-source=file:{pin}"


class InToken(KeyModuleContract):
    kind = "ec"
    uri: str

    @pytest.fixture(autouse=True)
    def _token(self, uri: str) -> None:
        self.uri = uri

    def make(self, tmp_path: Path) -> Made:
        enrolled = module.generate(making(self.uri.format(next(labels)), type=self.kind))
        return Made(module, enrolled.signature, enrolled.blob)


class TestEc(InToken):
    pass


class TestRsa(InToken):
    kind = "rsa"


class TestIsolated(InToken):
    @pytest.fixture(autouse=True)
    def _processes(self) -> Iterator[None]:
        isolation = pytest.importorskip("upcall.isolation.module", reason="this upcall isolates no modules")
        self.isolated = isolation.IsolatedModule("pkcs11", "upcall_pkcs11:module")
        yield
        self.isolated.close()

    def make(self, tmp_path: Path) -> Made:
        return super().make(tmp_path)._replace(module=self.isolated)
