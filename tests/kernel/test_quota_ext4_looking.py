"""`upcall quota` on the real kernel: what people see, and what it does not wait for."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.quota_scene import (
    MB,
    NAMES,
    NO_ROOM,
    PROJECT,
    Disk,
    QuotaHouse,
    fill,
    give_names,
    reachable_disk,
    run,
    status,
)
from upcall.kernel import quotactl
from upcall.kernel.mounts import mounts
from upcall.testing.lab.stage import PATIENCE, Person, do_as, person, wait_until

UPCALL = [sys.executable, "-P", "-m", "upcall"]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Disk]:
    with reachable_disk("ext4", tmp_path) as made:
        yield made


def says(who: Person, *words: str) -> tuple[int, str, str]:
    """Exit code, output, errors of `upcall quota`."""

    def work() -> tuple[int, str, str]:
        wide = {**os.environ, "COLUMNS": "150"}
        done = subprocess.run([*UPCALL, "quota", *words], capture_output=True, text=True, timeout=PATIENCE, env=wide)
        return done.returncode, done.stdout, done.stderr

    return do_as(who, work)


def test_quota_status_shows_ones_own_and_root_all(drive: Disk) -> None:
    root, alice, bob = person("root"), person("alice"), person("bob")
    give_names()
    drive.limit("u", alice.uid, MB, 4 * MB)
    drive.limit("P", PROJECT, 0, 2 * MB)
    assert fill(alice, drive.point / "alice", 2 * MB) == 0
    code, output, _ = says(alice, "status")
    assert code == 0
    line = next(line for line in output.splitlines() if "user alice" in line)
    assert line.startswith(str(drive.point))
    assert all(word in line for word in ("2 MiB", "1 MiB", "4 MiB", "7 days left, until")), line
    assert re.search(r" 20\d % ", line), line
    assert says(bob, "status")[:2] == (0, "no limits\n")
    assert says(bob, "status", "--user", "alice") == (
        os.EX_NOPERM, "", "upcall: other people's quotas are for root to see\n",
    )  # fmt: skip
    (row,) = json.loads(says(root, "status", "--project", NAMES[PROJECT], "--json")[1])
    assert (row["kind"], row["name"], row["hard"], row["mount"]) == (
        "project",
        NAMES[PROJECT],
        2 * MB,
        str(drive.point),
    )
    rows = json.loads(says(root, "status", "--all", "--json")[1])
    assert {(row["kind"], row["id"]) for row in rows} == {("user", alice.uid), ("project", PROJECT)}


class Watcher:
    """`upcall quota watch` of this person."""

    def __init__(self, who: Person, *words: str) -> None:
        line = [*UPCALL, "quota", "watch", *words]
        self._process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, user=who.uid, group=who.gid, extra_groups=[],
        )  # fmt: skip
        assert self._process.stderr is not None
        assert self._process.stdout is not None
        self._output = self._process.stdout
        assert select.select([self._process.stderr], [], [], PATIENCE)[0]
        assert b"watching" in self._process.stderr.readline()

    def line(self) -> str:
        assert select.select([self._output], [], [], PATIENCE)[0]
        return self._output.readline().decode()

    def nothing(self) -> bool:
        return not select.select([self._output], [], [], 0)[0]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)


def test_quota_watch_shows_ones_own_and_root_all_as_it_happens(drive: Disk) -> None:
    """As it happens: to whom it concerns, and to root."""
    root, alice, bob = person("root"), person("alice"), person("bob")
    drive.limit("u", alice.uid, 0, MB)
    with contextlib.ExitStack() as stack:
        hers, his, all_of_it = watchers = [Watcher(alice), Watcher(bob), Watcher(root, "--json")]
        for one in watchers:
            stack.callback(one.close)
        assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
        assert f"{drive.point}: user alice: nothing more can be written (by alice)" in hers.line()
        found: dict[str, Any] = json.loads(all_of_it.line())
        assert (found["kind"], found["name"], found["mount"], found["count"]) == ("user", "alice", str(drive.point), 1)
        assert his.nothing()


def test_another_network_namespace_is_refused_with_the_reason() -> None:
    line = ["unshare", "--net", *UPCALL, "quota", "watch"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == os.EX_USAGE
    assert "no generic netlink family VFS_DQUOT here" in done.stderr
    assert "this is not the first network namespace" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Path]:
    """A filesystem whose server never answers, as an NFS server that is gone: whoever touches it hangs."""
    run("modprobe fuse")
    point = tmp_path / "mute"
    point.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    assert libc.mount(b"mute", os.fsencode(point), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
    try:
        yield point
    finally:
        os.close(fd)
        run(["umount", "-l", str(point)])


def test_a_filesystem_that_hangs_is_not_touched(mute: Path, drive: Disk, tmp_path: Path) -> None:
    with subprocess.Popen(["stat", str(mute / "anything")], stderr=subprocess.DEVNULL) as hangs:
        with pytest.raises(subprocess.TimeoutExpired):
            hangs.wait(0.5)
        hangs.kill()
    root, alice = person("root"), person("alice")
    drive.limit("u", alice.uid, 0, MB)
    code, output, _ = says(alice, "status", "--json")
    assert (code, [row["mount"] for row in json.loads(output)]) == (0, [str(drive.point)])
    (tmp_path / "house").mkdir()
    place = QuotaHouse(tmp_path / "house")
    try:
        place.open(root)
        place.daemon(alice)
        wait_until(lambda: status()["filesystems"] == [str(drive.point)], "one filesystem")
        assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
        place.wait(alice, "over-hard")
    finally:
        place.close()


def test_a_filesystem_that_is_mounted_twice_counts_once(drive: Disk, tmp_path: Path) -> None:
    """One filesystem, however often it is mounted; what lies under another mount is looked at where it is seen."""
    again, part = tmp_path / "again", tmp_path / "part"
    for folder in (again, part):
        folder.mkdir()

    def where() -> list[str]:
        return [mount.point for mount in quotactl.with_quotas(mounts())]

    run(["mount", "--bind", str(drive.point / "shared"), str(part)])
    try:
        assert where() == [str(drive.point)]
        run(["mount", "--bind", str(drive.point), str(again)])
        try:
            assert len(where()) == 1
            run(["mount", "-t", "tmpfs", "none", str(drive.point)])  # lies above it now
            try:
                assert where() == [str(again)]
            finally:
                run(["umount", str(drive.point)])
        finally:
            run(["umount", str(again)])
    finally:
        run(["umount", str(part)])
    assert where() == [str(drive.point)]
