"""The quota source and the broker as processes: either is killed, stopped and started again under the other.

The kernel and the filesystem are played. tests/kernel/quota_cases.py has the same with the real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.quotakernel import ALICE, BOB
from tests.test_quota_flood import HERE, SURROUNDINGS, Kernel
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.protocols.quota.notice import take
from upcall.testing.processes import RunningBroker, RunningDaemon, Started, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to a netlink group")

GROUP = 25
CAROL = 5003
TELLING = DaemonSettings(plugins=Plugins(handlers=(ServiceHandler("quota", "answering:quota_telling"),)))


class Scene:
    """A broker, a quota source, and the machine's daemon, which is told of users without a daemon of their own."""

    def __init__(self, folder: Path, kernel: Kernel) -> None:
        self.folder, self.kernel = folder, kernel
        self._told, self._over = folder.parent / "told", folder.parent / "over"
        self._told.touch()
        self.over()
        self.started: list[Started] = []
        self.start_broker()
        self.daemon = RunningDaemon(
            folder, folder.parent / "keys", {}, [HERE],
            settings=TELLING, environment={"TOLD": str(self._told)},
        )  # fmt: skip
        self.started.append(self.daemon)
        self.broker.registered(self.daemon.pid)
        self.start_source()

    def start_broker(self) -> None:
        self.broker = RunningBroker(self.folder)
        self.started.append(self.broker)

    def start_source(self) -> None:
        words = [str(HERE / "quotasource.py"), str(self.folder), str(GROUP), str(self.kernel.portid)]
        self.source = Started(words, self.folder.parent / "source.log", SURROUNDINGS)
        self.started.append(self.source)
        until(lambda: self.status().get("pid") == self.source.pid, "the source is connected")
        until(lambda: self.status()["listening"], "and listens")
        until(lambda: self.status()["readings"], "and has read all quotas")

    def over(self, *uids: int) -> None:
        """These have used all that they may."""
        self._over.write_text(" ".join(map(str, uids)))

    def warn(self) -> None:
        """The kernel warns of alice and bob."""
        self.kernel.begin(GROUP, 1)
        until(lambda: self.kernel.done(0.1), "sent")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.broker.status()["quota"]
        return found

    def told(self) -> list[int]:
        """The uids that it was told of, in ascending order."""
        return sorted(take(line).subject.id for line in self._told.read_bytes().splitlines())

    def tells(self, *uids: int) -> None:
        """Waits until it was told of all of these uids, and checks that it was told of no other, and of none twice."""
        until(lambda: set(uids) <= set(self.told()), f"told of {uids}, not only {self.told()}")
        until(lambda: self.status()["undelivered"] == 0, "nothing waits")
        assert self.told() == sorted(uids)

    def written_down(self, *uids: int) -> None:
        """Waits until the state says that these were told."""

        def known() -> set[int]:
            try:
                said = json.loads((self.folder.parent / "quota.json").read_text())
            except FileNotFoundError:
                return set()
            return {number for _, _, number, *_ in said["states"]} if not said["kept"] else set()

        until(lambda: set(uids) <= known(), f"{uids} written down")

    def close(self) -> None:
        for process in reversed(self.started):
            with contextlib.suppress(ProcessLookupError):
                process.go_on()
            process.kill()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


@pytest.fixture
def scene(folder: Path, kernel: Kernel) -> Iterator[Scene]:
    made = Scene(folder, kernel)
    yield made
    made.close()


def test_a_source_that_is_killed_loses_nothing_and_tells_nothing_twice(scene: Scene) -> None:
    scene.over(ALICE, BOB)
    scene.warn()
    scene.tells(ALICE, BOB)
    scene.written_down(ALICE, BOB)
    scene.source.kill()
    until(lambda: scene.status() == {}, "the broker has noticed")
    scene.over(ALICE, BOB, CAROL)  # the kernel warns of carol, and nobody listens
    scene.start_source()
    scene.tells(ALICE, BOB, CAROL)
    before = scene.status()["received"]
    scene.warn()
    until(lambda: scene.status()["received"] == before + 2, "heard again")
    scene.tells(ALICE, BOB, CAROL)


def test_a_source_that_is_killed_with_notices_in_hand_has_written_them_down(scene: Scene) -> None:
    """No daemon is registered, and the state holds the notices."""
    scene.daemon.kill()
    until(lambda: not scene.broker.status()["daemons"], "no daemon")
    scene.over(ALICE, BOB)
    scene.warn()
    until(lambda: scene.status()["undelivered"] == 2, "both wait")
    state = scene.folder.parent / "quota.json"
    until(lambda: state.exists() and len(json.loads(state.read_text())["kept"]) == 2, "written down")
    scene.source.kill()
    scene.start_source()
    assert scene.status()["undelivered"] == 2
    assert scene.told() == []
    environment = {"TOLD": str(scene.folder.parent / "told")}
    again = RunningDaemon(
        scene.folder, scene.folder.parent / "keys", {}, [HERE],
        settings=TELLING, environment=environment,
    )  # fmt: skip
    scene.started.append(again)
    scene.tells(ALICE, BOB)


def test_a_source_outlives_a_killed_broker_and_delivers_to_the_next(scene: Scene) -> None:
    """The source goes on listening, and delivers when the next one has daemons."""
    source = scene.source.pid
    scene.broker.kill()
    scene.source.logged("broker-connect-failed")
    scene.over(ALICE, BOB)
    scene.warn()
    scene.start_broker()
    scene.broker.registered(scene.daemon.pid)
    scene.tells(ALICE, BOB)
    assert scene.status()["pid"] == source
    assert scene.source.log.count("broker-connected") == 2


def test_a_broker_that_is_stopped_is_waited_for(scene: Scene) -> None:
    scene.over(ALICE, BOB)
    scene.broker.stop()
    scene.warn()
    scene.broker.go_on()
    scene.tells(ALICE, BOB)


def test_a_source_that_is_asked_to_end_delivers_first(scene: Scene) -> None:
    scene.over(ALICE, BOB)
    scene.source.stop()
    scene.warn()
    scene.source.signal(signal.SIGTERM)
    scene.source.go_on()
    assert scene.source.wait() == 0
    until(lambda: scene.told() == [ALICE, BOB], "told")
    scene.written_down(ALICE, BOB)
    scene.start_source()
    scene.tells(ALICE, BOB)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_sigterm_sigint_and_sighup_end_the_source_with_status_0(scene: Scene, number: int) -> None:
    scene.source.signal(number)
    assert scene.source.wait() == 0
    assert "closed" in scene.source.log


def test_a_second_source_is_refused_by_the_broker_and_ends(scene: Scene) -> None:
    """Two would tell everything twice."""
    first = scene.source
    words = [str(HERE / "quotasource.py"), str(scene.folder), str(GROUP), str(scene.kernel.portid)]
    second = Started(words, scene.folder.parent / "second.log", SURROUNDINGS)
    scene.started.append(second)
    assert second.wait() != 0
    assert "the broker has a quota source already" in second.log
    assert scene.status()["pid"] == first.pid
    scene.over(ALICE, BOB)
    scene.warn()
    scene.tells(ALICE, BOB)


def test_daemons_and_requests_are_served_without_a_source(scene: Scene) -> None:
    scene.source.kill()
    until(lambda: scene.status() == {}, "noticed")
    assert scene.broker.status()["daemons"][0]["pid"] == scene.daemon.pid
