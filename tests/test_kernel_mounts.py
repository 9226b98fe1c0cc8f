"""mountinfo as the kernel writes it, and names that cost something to look up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcall.kernel import mounts as module
from upcall.kernel.mounts import Mount, Names, mounts, project_number, take_mounts

TEXT = rb"""21 1 254:3 / / rw,relatime shared:1 - ext4 /dev/vda3 rw,prjquota
40 32 7:1 / /tmp/x\040y\134\011z rw,relatime - xfs /dev/loop1 rw,attr2,usrquota
41 32 0:45 /sub /mnt ro shared:2 master:3 propagate_from:1 - tmpfs tmpfs rw
"""


def test_mountinfo_lines_are_parsed_with_escapes_and_options() -> None:
    root, disk, bind = take_mounts(TEXT)
    options = frozenset({"rw", "relatime", "prjquota"})
    assert root == Mount(os.makedev(254, 3), "/", "/", "ext4", "/dev/vda3", options, parent=1)
    assert (disk.point, disk.type, disk.source) == ("/tmp/x y\\\tz", "xfs", "/dev/loop1")
    assert (bind.root, bind.point, bind.device) == ("/sub", "/mnt", os.makedev(0, 45))


@pytest.mark.parametrize(
    "line",
    [b"", b"x", b"1 2 3 / / rw - ext4 /dev/x rw", b"1 2 a:b / / rw - ext4 /dev/x rw", b"1 2 7:0 / / rw ext4", b" - "],
)
def test_a_malformed_mountinfo_line_is_skipped(line: bytes) -> None:
    assert len(take_mounts(line + b"\n" + TEXT)) == 3


def test_a_mount_point_that_is_not_utf8_keeps_its_bytes() -> None:
    (found,) = take_mounts(b"1 2 7:0 / /\xff rw - ext4 /dev/x rw")
    assert os.fsencode(found.point) == b"/\xff"


def test_the_mounts_of_this_process_include_the_root() -> None:
    assert "/" in {mount.point for mount in mounts()}


def test_names_of_users_groups_and_projects_are_looked_up_and_cached(tmp_path: Path) -> None:
    projects = tmp_path / "projid"
    names = Names(projects)
    assert names.user(0) == names.subject(0, 0) == "root"
    assert names.group(0) == "root"
    assert names.user(4_000_000_000) == names.group(4_000_000_000) == "4000000000"
    assert names.project(77) == "77"
    projects.write_text("# none\nweb:7\n\nnonsense\nbuild farm:77 # ours\n")
    assert names.project(77) == "77"  # for a while the last answer counts
    assert names.project(7) == "web"
    assert Names(projects).subject(2, 77) == "build farm"
    assert project_number("build farm", projects) == 77
    for name in ("farm", "", "none"):
        with pytest.raises((KeyError, ValueError)):
            project_number(name, projects)


def test_the_cache_of_names_is_bounded_and_ages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look(uid: int) -> str:
        asked.append(uid)
        return str(uid)

    monkeypatch.setattr(module, "_user", look)
    names = Names(tmp_path)
    for uid in range(2000):
        names.user(uid)
    assert len(names._known) == 1024
    names.user(1999)
    assert len(asked) == 2000
    names.user(0)
    assert asked[-1] == 0
    monkeypatch.setattr(module, "_NAMES_AGE", 0.0)
    names.user(1999)
    assert asked[-1] == 1999


def test_a_later_mount_is_noticed_once() -> None:
    """In a mount namespace of its own."""
    code = (
        "from upcall.kernel.mounts import Changes\n"
        "import subprocess\n"
        "changes = Changes()\n"
        "print(changes.seen())\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', '/mnt'], check=True)\n"
        "print(changes.seen(), changes.seen())\n"
    )
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if "Operation not permitted" in done.stderr or "must be superuser" in done.stderr:
        pytest.skip("only root may mount")
    assert done.stdout.split() == ["False", "True", "False"], done.stderr
