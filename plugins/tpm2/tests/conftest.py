"""TPMs in software, and keys in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upcall_tpm2 import module
from upcall_tpm2.swtpm import SoftwareTpm, missing

from upcall.enrol import chosen
from upcall.keymodule import Enrolled, Limits, Making
from upcall.testing.secrets import Told

PIN = b"2718"
Generate = Callable[..., Enrolled]


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    if what := missing():
        pytest.skip(what)
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key.tss2"


@pytest.fixture
def told(path: Path) -> Told:
    """Somebody who knows the PIN."""
    return Told(pins={f"tpm2 {path}": PIN})


@pytest.fixture
def making(tpm: SoftwareTpm, path: Path, told: Told) -> Making:
    values = chosen(module.parameters, {"tcti": tpm.tcti})
    return Making(path, values, bytearray(), "none", Limits(), told)


@pytest.fixture
def generate(making: Making) -> Generate:
    def generate(**values: str) -> Enrolled:
        return module.generate(making._replace(values={**making.values, **values}))

    return generate
