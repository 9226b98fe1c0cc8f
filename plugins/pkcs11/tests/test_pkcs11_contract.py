"""The contract of key modules, kept in the test's own process and in one of the module's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

from upcall_pkcs11 import module
from upcall_pkcs11.softhsm import PIN, SoftHsm, TypedPins, missing

from upcall.core.errors import ModuleFailed
from upcall.testing.contract import KeyModuleContract, Made

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
labels = (f"key{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """One token for all, and its PIN in a file: a library in use does not look for new tokens."""
    hsm = SoftHsm(tmp_path_factory.mktemp("softhsm"))
    hsm.add("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(hsm.config))
        yield hsm


class InToken(KeyModuleContract):
    """The contract knows no PINs, so they come from the file."""

    kind = "ec"
    hsm: SoftHsm

    @pytest.fixture(autouse=True)
    def _token(self, hsm: SoftHsm) -> None:
        self.hsm = hsm

    def make(self, tmp_path: Path) -> Made:
        enrolled = self.hsm.new_key(self.kind, label=next(labels), with_pin=True)
        return Made(module, enrolled.signature, enrolled.blob)


class TestEc(InToken):
    pass


class TestRsa(InToken):
    kind = "rsa"


class TestIsolated(InToken):
    @pytest.fixture(autouse=True)
    def _processes(self) -> Iterator[None]:
        isolation = pytest.importorskip("upcall.daemon.isolation.module", reason="this upcall isolates no modules")
        self.isolated = isolation.IsolatedModule("pkcs11", "upcall_pkcs11:module")
        yield
        self.isolated.close()

    def make(self, tmp_path: Path) -> Made:
        return super().make(tmp_path)._replace(module=self.isolated)

    def test_pins_are_asked_for_and_judged_across_the_processes(self) -> None:
        enrolled = self.hsm.new_key(label=next(labels))
        secrets = TypedPins(b"0000")
        key = self.isolated.open(enrolled.signature, enrolled.blob, secrets)
        wrapped = key.wrap(b"file key")
        assert secrets.asked == []
        with pytest.raises(ModuleFailed, match="the PIN was wrong"):
            key.unwrap(wrapped)
        secrets.typed = PIN
        assert key.unwrap(wrapped) == key.unwrap(wrapped) == b"file key"
        assert len(secrets.asked) == 2
        assert secrets.verdicts == [False, True]
