"""Brokers restarted and daemons killed under load, while an attacker takes every portid of netlink that becomes free.

UPCALL_ATTACK_RESTARTS says how often each; 100 take about half an hour in an emulated machine (`--timeout 4000`).
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.attacks.attacker import Attacker
from tests.attacks.spin import spin
from tests.kernel.scene import CONTENT, Gate, House, keys, vault
from upcall.testing.lab.stage import Person, drop_caches, serving, wait_until

RESTARTS = int(os.environ.get("UPCALL_ATTACK_RESTARTS", "5"))
STRANGER = 64302
SLOW = 60.0  # seconds until a file is made and another read: the kernel gives a lost request up after 3


class Work(NamedTuple):
    """What a person's process has done."""

    made: int
    read: int
    failed: int
    wrong: list[str]


class Progress:
    """Counts in memory that processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4)

    @property
    def value(self) -> int:
        return int.from_bytes(self._memory[:4], "little")

    def advance(self) -> None:
        self._memory[:4] = (self.value + 1).to_bytes(4, "little")


def at_work(folder: Path, progress: Progress, over: Gate) -> Callable[[], Work]:
    """Makes a file and opens an older one, again and again; each asks the daemon if nothing of it is in memory."""

    def work() -> Work:
        made: list[Path] = []
        read = failed = number = 0
        wrong = []
        while not over.is_open:
            number += 1
            path = folder / f"file-{number}"
            try:
                path.write_bytes(CONTENT)
                made.append(path)
                older = made[number * 7919 % len(made)]
                if older.read_bytes() != CONTENT:
                    wrong.append(older.name)
                read += 1
                progress.advance()
            except OSError:
                failed += 1
        return Work(len(made), read, failed, wrong)

    return work


def cold(over: Gate) -> Callable[[], None]:
    def work() -> None:
        while not over.is_open:
            drop_caches()
            time.sleep(0.2)  # so that there is time for anything else

    return work


@pytest.mark.time_limit(120 + 36 * RESTARTS)
def test_restarts_and_kills_under_load_give_nothing_away(
    house: House, root: Person, alice: Person, bob: Person
) -> None:
    people = {alice: keys()["rsa2048"].signature, bob: keys()["captured"].signature}
    daemons = {who: house.daemon(who) for who in people}
    progress = {who: Progress() for who in people}
    over, received, taken, tried = house.gate(), [], 0, 0
    with (
        vault(alice, people[alice]) as alices,
        vault(bob, people[bob]) as bobs,
        Attacker(STRANGER, spin) as attacker,
    ):
        tasks = [house.run(one.who, at_work(one.upper, progress[one.who], over)) for one in (alices, bobs)]
        house.run(root, cold(over))

        def goes_on(who: Person) -> None:
            before = progress[who].value
            wait_until(lambda: progress[who].value > before, f"files of {who.name}", SLOW)

        def look() -> None:
            nonlocal taken, tried
            report = attacker.asked("report", 60)
            received.extend(report["got"])
            taken, tried = taken + len(report["taken"]), tried + report["tried"]

        for who in people:
            goes_on(who)
        for number in range(RESTARTS):
            assert house.broker is not None
            house.broker.end(signal.SIGTERM if number % 2 else signal.SIGKILL)
            house.open()
            for who, daemon in daemons.items():
                wait_until(lambda who=who, daemon=daemon: serving(who.uid) == daemon.pid, f"the daemon of {who.name}")  # type: ignore[misc]
                goes_on(who)
            look()
        for number in range(RESTARTS):
            who = (alice, bob)[number % 2]
            daemons[who].end(signal.SIGKILL)
            daemons[who] = house.daemon(who)
            for one in people:
                goes_on(one)
            look()
        over.open()
        done = [task.result(SLOW) for task in tasks]
    print(f"{RESTARTS} restarts, {RESTARTS} kills: {done}; {tried} binds tried, {taken} portids taken")
    assert received == []
    assert tried > 0
    assert taken > 0, "portids of links that are over are free"
    for work in done:
        assert isinstance(work, Work)
        assert work.wrong == []
        assert work.made >= 2 * RESTARTS
        assert work.read >= 2 * RESTARTS
