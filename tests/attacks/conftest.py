"""Provides what the attacks need: root, for other uids; a network namespace; a Python that other uids can run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.attacks.scene import Network, World, python
from upcall.testing.processes import NotInTime


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if python() is None:
        pytest.skip("other users can run no Python that imports upcall")
    try:
        made = Network()
    except NotInTime as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def world(network: Network) -> Iterator[World]:
    made = World(network)
    yield made
    made.close()
