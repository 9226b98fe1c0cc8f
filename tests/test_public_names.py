"""The names that programs import from `upcall` itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import upcall


@pytest.mark.parametrize("name", upcall.__all__)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(upcall, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nonsense'"):
        upcall.__getattr__("nonsense")


def test_dir_shows_the_public_names_and_none_of_the_modules_own() -> None:
    shown = {name for name in dir(upcall) if not name.startswith("__")}
    assert shown == set(upcall.__all__) - {"__version__"}
    assert "__version__" in dir(upcall)


def test_every_error_is_an_upcall_error() -> None:
    errors = [getattr(upcall, name) for name in upcall.__all__]
    errors = [one for one in errors if isinstance(one, type) and issubclass(one, BaseException)]
    assert len(errors) == 7
    assert all(issubclass(one, upcall.UpcallError) for one in errors)


def test_importing_upcall_imports_neither_a_client_nor_asyncio() -> None:
    code = (
        "import sys, upcall; print([name for name in sys.modules if name == 'asyncio' or name.startswith('upcall.')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
