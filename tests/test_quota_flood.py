"""100,000 quota warnings in ten seconds from one user: what everybody else notices of it. The processes are real, and
netlink; the kernel is played, as fast as agreed. tests/kernel/test_quota_ext4_flood.py has the same with the real one.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quotakernel import ALICE, BOB
from upcall.client import Client
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.protocols.quota.notice import take
from upcall.testing.processes import NotInTime, RunningBroker, RunningDaemon, Started, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to a netlink group")

HERE = Path(__file__).parent
SURROUNDINGS = {"PYTHONPATH": str(HERE.parent)}
OURS = 26  # a group
ROUNDS, RATE, SECONDS = 5, 10_000, 2
COUNT = RATE * SECONDS  # in a round
MB = 1 << 20
TELLING = DaemonSettings(plugins=Plugins(handlers=(ServiceHandler("quota", "answering:quota_telling"),)))


class Kernel:
    """The one who warns."""

    def __init__(self) -> None:
        line = [sys.executable, str(HERE / "quotakernel.py")]
        environment = {**os.environ, **SURROUNDINGS}
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.portid = int(self._stdout.readline().split()[1])

    def begin(self, group: int, count: int = COUNT, rate: int = RATE) -> None:
        self._stdin.write(f"{group} {count} {rate}\n".encode())
        self._stdin.flush()

    def done(self, wait: float = 0.0) -> bool:
        return bool(select.select([self._stdout], [], [], wait)[0]) and self._stdout.readline() == b"done\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


class Scene:
    """A broker, a quota source, and root's daemon, which hears of those who have none, and answers."""

    def __init__(self, folder: Path, signature: str, kernel: Kernel) -> None:
        self._folder, self._signature = folder, signature
        self._told = folder.parent / "told"
        self._told.touch()
        self.broker = RunningBroker(folder)
        line = ["-m", "bench.quotasource", str(folder), str(OURS), str(kernel.portid)]
        self.source = Started(line, folder.parent / "source.log", SURROUNDINGS)
        until(lambda: self.status().get("listening"), "it listens")
        self.daemon = RunningDaemon(
            folder, folder.parent / "keys", {"toy": "upcall.testing.toy:TOY"}, [HERE],
            settings=TELLING, environment={"TOLD": str(self._told)},
        )  # fmt: skip
        with Client(folder) as client:
            until(lambda: [one["pid"] for one in client.status()["daemons"]] == [self.daemon.pid], "a daemon")

    def status(self) -> dict[str, int]:
        with Client(self._folder) as client:
            found: dict[str, int] = client.status()["quota"]
            return found

    def accounted(self) -> int:
        """How many messages the source knows of, lost ones included."""
        found = self.status()
        return found["received"] + found["lost"]

    def told(self) -> list[tuple[int, str]]:
        """Whom of, and what."""
        notices = [take(line) for line in self._told.read_bytes().splitlines()]
        return [(one.subject.id, one.event) for one in notices]

    def answered_until(self, kernel: Kernel) -> int:
        """How often somebody else has asked and been answered meanwhile."""
        answered = 0
        with Client(self._folder) as client:
            while not kernel.done():
                client.wrap(self._signature, bytes(32))
                answered += 1
        return answered

    def resident(self) -> int:
        """The source's memory, in bytes."""
        return int(Path(f"/proc/{self.source.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def close(self) -> None:
        self.daemon.kill()
        self.source.kill()
        self.broker.kill()


@pytest.fixture
def scene(folder: Path, signature: str, kernel: Kernel) -> Iterator[Scene]:
    made = Scene(folder, signature, kernel)
    yield made
    made.close()


def test_a_flood_of_warnings_is_folded_without_loss_and_told_once_per_user(scene: Scene, kernel: Kernel) -> None:
    """What it costs others in time is the benchmark's (`quota`)."""
    memory = scene.resident()
    for _ in range(ROUNDS):
        kernel.begin(OURS)
        assert scene.answered_until(kernel) > 0, "others are answered while it lasts"
    sent = ROUNDS * (COUNT + 1)
    until(lambda: scene.status()["received"] >= sent, "all received")
    found = scene.status()
    assert (found["received"], found["lost"], found["dropped"], found["nonsense"]) == (sent, 0, 0, 0)
    assert found["folded"] > sent * 0.98
    assert scene.resident() - memory < 8 * MB
    until(lambda: len(scene.told()) >= 2, "both are told of")
    assert sorted(scene.told()) == [(ALICE, "over-hard"), (BOB, "over-hard")]


def test_warnings_missed_by_a_stopped_source_are_counted_exactly(scene: Scene, kernel: Kernel) -> None:
    scene.source.stop()
    kernel.begin(OURS, 100_000, 10_000_000)
    until(lambda: kernel.done(0.1), "sent", 60)
    scene.source.go_on()
    sent = 100_001

    def shown() -> bool:
        """Only what comes next shows what is missing; until the buffer is empty again that is lost, too."""
        nonlocal sent
        kernel.begin(OURS, 1)
        until(lambda: kernel.done(0.1), "sent")
        sent += 2
        with contextlib.suppress(NotInTime):
            until(lambda: scene.accounted() >= sent, "known", 0.5)
        return scene.accounted() == sent

    until(shown, "every message is accounted for")
    found = scene.status()
    assert found["overflows"] > 0
    assert found["received"] > 40_000
    assert found["lost"] > 40_000
    scene.source.logged(f"quota-warnings-lost messages={found['lost']}")
    until(lambda: len(scene.told()) >= 2, "both are told of")
    assert sorted(scene.told()) == [(ALICE, "over-hard"), (BOB, "over-hard")]
