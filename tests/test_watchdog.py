"""The watchdog is fed while there is progress: by the daemon's workers, and by the quota source's clerk.

With a socket in the service manager's place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_kernel_notify import Listening
from upcall.daemon.workers import AT_MOST, PER_LANE
from upcall.kernel.genetlink import Ids, Listener, NoFamily
from upcall.kernel.notify import Manager
from upcall.process.paths import Place
from upcall.protocols.ecryptfs.packets import Ask, FileKey, pack_ask, pack_file_key
from upcall.protocols.quota.process import SourceProcess
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.source import QuotaSetup, QuotaSource
from upcall.testing.gate import Gate, Visitor
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon

MODULES = {"toy": "upcall.testing.toy:TOY", "bad": "misbehaving:BAD"}
USEC = 60_000  # so WATCHDOG=1 comes every 20 ms
QUIET = 0.4  # seconds without a word: many times that
SHORT = 1.0  # seconds that a request may take that will hang


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listening]:
    made = Listening(tmp_path / "notify")
    yield made
    made.socket.close()


class Scene:
    """A daemon with a manager, and keys that hang until the test lets go of them."""

    def __init__(self, broker: RunningBroker, daemon: RunningDaemon, manager: Listening, gate: Gate) -> None:
        self.broker, self.daemon, self.manager, self._gate = broker, daemon, manager, gate
        self.requester = PlayedRequester(broker.folder)
        self.held: list[Visitor] = []

    def ask(self, number: int) -> None:
        self.requester.ask(wrap_of(signature(number)), timeout=SHORT)

    def hang(self, number: int) -> None:
        self.ask(number)
        self.held.append(self._gate.arrived())

    def overdue(self) -> None:
        """Until the broker has given up all that hangs."""
        assert {self.requester.reason() for _ in self.held} == {"timed-out"}

    def fed(self, within: float = PATIENCE) -> bool:
        """Whether the manager is told anything from now on, within so many seconds."""
        self.manager.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.manager.socket.recv(4096)
        self.manager.socket.settimeout(within)
        try:
            self.manager.hear("WATCHDOG=1")
        except TimeoutError:
            return False
        return True


def signature(number: int) -> str:
    return f"{number:016x}"


def wrap_of(name: str) -> bytes:
    return pack_ask(Ask(0x42, name, pack_file_key(FileKey(0, bytes(16)))))


@pytest.fixture
def scene(
    folder: Path, broker: RunningBroker, keyring: FolderKeyring, manager: Listening, gate: Gate
) -> Iterator[Scene]:
    for number in range(AT_MOST + 1):
        keyring.add(signature(number), "bad", f"gate {gate.path}".encode())
    environment = {**manager.environment, "WATCHDOG_USEC": str(USEC)}
    here = [Path(__file__).parent]
    with RunningDaemon(folder, folder.parent / "keys", MODULES, here, environment=environment) as daemon:
        broker.registered(daemon.pid)
        made = Scene(broker, daemon, manager, gate)
        with made.requester:
            yield made


def test_the_watchdog_is_fed_except_while_all_workers_hang_and_requests_wait(scene: Scene) -> None:
    for number in range(AT_MOST):
        scene.hang(number)
    assert scene.fed()  # they have time still
    scene.overdue()
    assert scene.fed()  # and nobody waits for one of them
    scene.ask(AT_MOST)
    assert not scene.fed(QUIET)
    scene.daemon.logged("workers-stuck")
    assert scene.requester.reason() == "timed-out"
    for visitor in scene.held:
        visitor.release()
    assert scene.fed(), "the manager is told again"
    scene.hang(AT_MOST)
    scene.held[-1].release()
    assert scene.requester.reason() == "answered"


def test_a_key_module_that_hangs_blocks_its_own_lane_only(scene: Scene) -> None:
    for _ in range(PER_LANE):
        scene.ask(0)
    scene.held += [scene._gate.arrived() for _ in range(PER_LANE)]
    scene.overdue()
    scene.ask(0)
    assert scene.requester.reason() == "busy"
    assert scene.fed()
    assert "stuck" not in scene.daemon.log


# --- the quota source ----------------------------------------------------------------------------------------------


def test_a_source_whose_clerk_has_died_does_not_feed_the_watchdog(
    folder: Path, manager: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Ids) -> Listener:
        raise NoFamily("there is none")

    told = Manager({**manager.environment, "WATCHDOG_USEC": str(USEC)})
    setup = QuotaSetup(Rules(), folder / "quota.json", Ids(28, 0), listen=refuse)
    process = SourceProcess(Place(folder), setup, told)
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        manager.hear("READY=1")
        manager.hear("WATCHDOG=1")
        monkeypatch.setattr(QuotaSource, "lives", False)
        manager.socket.settimeout(QUIET)
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                manager.hear("WATCHDOG=1")
    finally:
        process.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.parametrize(("why", "alive", "lives"), [("", True, True), ("", False, False), ("no right", False, True)])
def test_a_clerk_counts_as_alive_while_its_thread_runs_or_without_quotas(why: str, alive: bool, lives: bool) -> None:
    """Without quota warnings there is no clerk, which is no reason for a restart."""
    quota = QuotaSource.__new__(QuotaSource)
    gate = threading.Event()
    quota.why, quota._thread = why, threading.Thread(target=gate.wait, daemon=True)
    if alive:
        quota._thread.start()
    assert quota.lives is lives
    gate.set()
