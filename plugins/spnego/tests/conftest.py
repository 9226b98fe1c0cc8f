"""Provides a realm for each test file, and a handler in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler
from upcall_spnego.mitkdc import Realm, missing


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    if why := missing():
        pytest.skip(why)
    with Realm(tmp_path_factory.mktemp("realm")) as running:
        yield running


@pytest.fixture
def handler(realm: Realm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpnegoHandler:
    """A handler that finds only the files that the test puts into its folder."""
    for name, value in realm.at_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    return SpnegoHandler(str(tmp_path / "krb5cc"))
