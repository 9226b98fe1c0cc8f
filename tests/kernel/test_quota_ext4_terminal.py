"""All of the way: a kernel that warns, the broker, the daemon that `upcall daemon` starts, its person's terminal."""

from __future__ import annotations

import os
import pty
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.quota_scene import MB, NO_ROOM, Disk, QuotaHouse, fill, quiet, reachable_disk
from upcall.testing.lab.stage import PATIENCE, Person, end, person, start_daemon

TTY = 5  # the group


class Screen:
    """A terminal in which somebody has logged in."""

    def __init__(self, who: Person) -> None:
        self.master, self._slave = pty.openpty()
        path = os.ttyname(self._slave)
        os.chown(path, who.uid, TTY)
        os.chmod(path, 0o620)

    def shows(self, words: str) -> str:
        text = ""
        while words not in text:
            assert select.select([self.master], [], [], PATIENCE)[0], f"not {words!r}, but {text!r}"
            text += os.read(self.master, 4096).decode()
        return text

    def is_empty(self) -> bool:
        return not select.select([self.master], [], [], 0)[0]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Disk]:
    with reachable_disk("ext4", tmp_path) as made:
        yield made


@pytest.fixture
def house(drive: Disk, tmp_path: Path) -> Iterator[QuotaHouse]:
    """The broker starts when the disk is mounted already."""
    (tmp_path / "house").mkdir()
    made = QuotaHouse(tmp_path / "house")
    try:
        made.open(person("root"))
        yield made
    finally:
        made.close()


@pytest.mark.usefixtures("house")
def test_whose_quota_it_is_reads_it_on_the_terminal(drive: Disk) -> None:
    alice, bob = person("alice"), person("bob")
    hers, his = Screen(alice), Screen(bob)
    daemons = [start_daemon(who) for who in (alice, bob)]
    try:
        drive.limit("u", alice.uid, 0, MB)
        assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
        shown = hers.shows("nothing more can be written")
        assert f"Quota used up: Your files on {drive.point} take up" in shown
        assert "the limit is 1 MiB" in shown
        quiet()
        assert his.is_empty()
    finally:
        for daemon in daemons:
            end(daemon)
