"""Ring 3: the real kernel. Runs in the lab's guest only (`make test`, or `upcall lab run -- python -m pytest ...`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.kernel.groups import elsewhere
from tests.kernel.scene import House, enrol, keys
from upcall.testing.lab.fileserver import FileServer, missing, server
from upcall.testing.lab.kerberos import Realm, realm
from upcall.testing.lab.stage import Person, kernel_faults, person

TIME_LIMIT = 1500  # seconds: only against a test that hangs, in a guest that is emulated on a busy machine


def _why_not(file: str) -> str | None:
    if not os.environ.get("UPCALL_LAB"):
        return "needs the lab's guest: run `python -m tests.run_lab`"
    if not elsewhere(file) and not Path("/dev/ecryptfs").exists():
        return "this kernel has no /dev/ecryptfs"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if why := _why_not(item.path.name):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _sound_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test after which the kernel's log has a fault, and all later ones: their results would mean nothing."""

    def too_long(_number: int, _frame: FrameType | None) -> None:
        pytest.fail(f"still running after {limit} s")

    marked = request.node.get_closest_marker("time_limit")
    limit = int(marked.args[0]) if marked else TIME_LIMIT
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    faults = kernel_faults()
    if faults:
        request.session.shouldstop = "the kernel is broken: " + faults[0]
        pytest.fail("\n".join(faults))


@pytest.fixture(scope="session")
def root() -> Person:
    return _enrolled("root", "captured")


@pytest.fixture(scope="session")
def alice() -> Person:
    return _enrolled("alice", "rsa2048")


@pytest.fixture(scope="session")
def bob() -> Person:
    return _enrolled("bob", "captured")


def _enrolled(name: str, key: str) -> Person:
    found = person(name)
    enrol(found, keys()[key])
    return found


@pytest.fixture
def house() -> Iterator[House]:
    """A broker for one test, which starts its daemons itself."""
    made = House()
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def kerberos() -> Iterator[Realm]:
    """A realm with a running KDC. No user has a ticket."""
    if packages := missing():
        pytest.skip(f"not installed: {', '.join(packages)}")
    with realm() as made:
        yield made


@pytest.fixture(scope="session")
def share(kerberos: Realm) -> Iterator[FileServer]:
    """A running file server that requires encryption."""
    with server(kerberos) as made:
        yield made
