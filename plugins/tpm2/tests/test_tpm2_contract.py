"""The contract of all key modules, kept by keys with and without PCRs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_tpm2 import module
from upcall_tpm2.swtpm import SoftwareTpm, missing

from upcall.core.errors import ModuleFailed
from upcall.daemon.isolation.module import IsolatedModule
from upcall.keymodule import Limits, Making
from upcall.keys.enrolment import chosen, prove
from upcall.testing.contract import KeyModuleContract, Made
from upcall.testing.secrets import GivenSecrets
from upcall.testing.subject import make_key


class TestSealed(KeyModuleContract):
    values: dict[str, str] = {}

    @pytest.fixture(autouse=True)
    def _tpm(self, tmp_path: Path) -> Iterator[None]:
        if what := missing():
            pytest.skip(what)
        with SoftwareTpm(tmp_path / "tpm") as self.tpm:
            yield

    def make(self, tmp_path: Path) -> Made:
        return make_key(module, module, tmp_path, {"tcti": self.tpm.tcti, **self.values})


class TestSealedToPcrs(TestSealed):
    values = {"pcrs": "sha256:7,11"}


class TestSealedWithPin(TestSealed):
    values = {"pin": "yes"}


def test_an_isolated_module_passes_on_pins_verdicts_and_refusals(tmp_path: Path) -> None:
    """The module runs in a process of its own, as in a daemon."""
    if what := missing():
        pytest.skip(what)
    path = tmp_path / "key.tss2"
    good, wrong = (GivenSecrets(pins={f"tpm2 {path}": pin}) for pin in (b"2718", b"wrong"))
    isolated = IsolatedModule(module.name, "upcall_tpm2:module")
    with SoftwareTpm(tmp_path / "tpm") as tpm, contextlib.closing(isolated):
        values = chosen(module.parameters, {"tcti": tpm.tcti, "pin": "yes"})
        key = module.generate(Making(path, values, bytearray(), "none", Limits(), good))
        handle = isolated.open(key.signature, key.blob, good)
        prove(handle, Limits())
        with pytest.raises(ModuleFailed, match="wrong PIN"):
            isolated.open(key.signature, key.blob, wrong)
        tpm.kill()
        with pytest.raises(ModuleFailed, match="no TPM can be reached there"):
            isolated.open(key.signature, key.blob, good)
        prove(handle, Limits())
    assert (good.verdicts, wrong.verdicts) == ([(f"tpm2 {path}", True)], [(f"tpm2 {path}", False)])
    assert good.wiped()
