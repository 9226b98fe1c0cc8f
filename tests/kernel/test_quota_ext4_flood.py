"""Who floods costs a counter: 100,000 warnings of the real kernel, and others who go on meanwhile."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.quota_scene import (
    MB,
    NO_ROOM,
    Answering,
    Disk,
    QuotaHouse,
    fill,
    quiet,
    reachable_disk,
    remove,
    status,
)
from upcall.client import Client
from upcall.process.paths import SYSTEM_FOLDER
from upcall.testing.lab.stage import Person, Task, do_as, person, wait_until

ROUNDS, CYCLES = 4, 12_500  # a cycle is two warnings: over the soft limit, and below it
MORE_THAN_FITS = 30_000  # cycles: the socket's buffer holds 43,000 warnings
PAUSE = 0.01  # seconds between two of somebody else's requests: there is one processor for all of them
FLOOD = 1200.0  # seconds for one, on a machine that has other things to do


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Disk]:
    with reachable_disk("ext4", tmp_path) as made:
        yield made


@pytest.fixture
def place(drive: Disk, tmp_path: Path) -> Iterator[QuotaHouse]:
    (tmp_path / "house").mkdir()
    made = QuotaHouse(tmp_path / "house")
    try:
        made.open(person("root"))
        made.daemon(person("alice"))
        made.daemon(person("bob"), Answering)
        yield made
    finally:
        made.close()


def limited(drive: Disk, who: Person) -> None:
    """One file more is one too many."""
    drive.limit("u", who.uid, files=(1, 0))


def flood(drive: Disk, who: Person, cycles: int) -> Task[float]:
    """Makes a file and removes it, so often; gives the seconds that it took."""
    path = os.fspath(drive.point / f"{who.name}-again")

    def work() -> float:
        began = time.monotonic()
        for _ in range(cycles):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.unlink(path)
        return time.monotonic() - began

    return Task(who, work)


def asked_meanwhile(task: Task[float], client: Client) -> tuple[float, float]:
    """The median of what somebody else waits for an answer while the task runs, and how long that takes; seconds."""
    waits = []
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(task.end)
        while not task.ended:
            began = time.monotonic()
            assert client.ask("key", Answering.ASK) == Answering.REPLY
            waits.append(time.monotonic() - began)
            time.sleep(PAUSE)
        on_failure.pop_all()
    return statistics.median(waits), task.result(FLOOD)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.time_limit(3 * FLOOD)
def test_a_flood_of_warnings_is_received_whole_and_others_are_told(drive: Disk, place: QuotaHouse) -> None:
    alice, bob = person("alice"), person("bob")
    assert place.source is not None
    for who in (alice, bob):
        do_as(who, (drive.point / f"{who.name}-first").touch)
    limited(drive, alice)
    drive.limit("u", bob.uid, 0, MB)
    before, memory = status(), resident(place.source.pid)
    ratios, took = [], 0.0
    with Client(SYSTEM_FOLDER, bob.uid) as client:
        for number in range(ROUNDS):
            calm, _ = asked_meanwhile(flood(drive, bob, CYCLES), client)  # the same work without a warning
            task = flood(drive, alice, CYCLES)
            if number == ROUNDS // 2:
                assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM
                assert not task.ended
            flooded, seconds = asked_meanwhile(task, client)
            ratios.append(flooded / calm)
            took += seconds
    wait_until(lambda: status()["received"] - before["received"] >= 2 * ROUNDS * CYCLES + 1, "all received")
    found = status()
    print(f"{2 * ROUNDS * CYCLES / took:,.0f} warnings/s; p50 of others by {ratios}", end=" ")
    assert found["received"] - before["received"] == 2 * ROUNDS * CYCLES + 1
    assert (found["lost"], found["dropped"], found["nonsense"], found["overflows"]) == (0, 0, 0, 0)
    assert resident(place.source.pid) - memory < 8 * MB
    place.wait(bob, "over-hard")
    place.wait(alice, "over-soft")
    quiet()
    assert place.events(bob) == ["over-hard"]
    assert place.events(alice) == ["over-soft"]


@pytest.mark.time_limit(3 * FLOOD)
def test_warnings_beyond_the_buffer_are_counted_as_lost_and_made_up_for(drive: Disk, place: QuotaHouse) -> None:
    """The source is stopped meanwhile: what is lost is known to the message, and made up for."""
    alice, bob = person("alice"), person("bob")
    do_as(alice, (drive.point / "first").touch)
    limited(drive, alice)
    drive.limit("u", bob.uid, 0, MB)
    before = status()
    with place.source_stopped():
        flood(drive, alice, MORE_THAN_FITS).result(FLOOD)
        assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM  # the kernel's word of it is lost
    assert place.wait(bob, "over-hard").raw is None
    sent = 2 * MORE_THAN_FITS + 1

    def known() -> int:
        found = status()
        return int(found["received"] + found["lost"] - before["received"] - before["lost"])

    def shown() -> bool:
        """Only what comes next shows what is missing; until the buffer is empty again that is lost, too."""
        nonlocal sent
        flood(drive, alice, 1).result()
        sent += 2
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: known() >= sent, "known", 2)
        return known() == sent

    wait_until(shown, "every message is accounted for")
    quiet()
    found = status()
    assert known() == sent
    assert found["received"] > 40_000
    assert found["lost"] > 10_000
    assert found["overflows"] > 0
    assert f"quota-warnings-lost messages={found['lost']}" in (place.folder / "source.log").read_text()
    remove(bob, drive.point / "bob")
    place.wait(bob, "below")
    assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM
    place.wait(bob, "over-hard", 2)
    assert place.events(bob) == ["over-hard", "below", "over-hard"]
