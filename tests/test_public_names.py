"""The names that programs import from `upcall` itself."""

from __future__ import annotations

import pytest

import upcall


@pytest.mark.parametrize("name", upcall.__all__)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(upcall, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nonsense'"):
        upcall.__getattr__("nonsense")
