"""Which folders eCryptfs has mounted, as mountinfo and the mounts themselves say."""

from __future__ import annotations

import os
from pathlib import Path

from upcall.kernel.mounts import Mount, mounts
from upcall.protocols.ecryptfs.mounted import Lowers, lower_folders, mount_above


def mounted(point: Path, source: str, device: int | None = None) -> Mount:
    return Mount(point.stat().st_dev if device is None else device, "/", str(point), "ecryptfs", source, frozenset())


def above(path: Path, lowers: Lowers) -> tuple[Mount, Path] | None:
    top = os.open(path, os.O_PATH)
    try:
        return mount_above(top, lowers)
    finally:
        os.close(top)


def test_a_mount_whose_source_is_a_path_has_that_lower_folder(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    mount = mounted(upper, str(lower))
    found = lower_folders([mount])
    assert above(lower, found) == (mount, lower)
    assert above(upper, found) is None


def test_the_lower_folder_of_a_mount_by_upcall_is_found_by_its_inode_and_filesystem(tmp_path: Path) -> None:
    """Both are those of the lower folder, as the kernel shows them; here it stands for the mount itself."""
    lower, other = tmp_path / "lower", tmp_path / "other"
    (lower / "below").mkdir(parents=True)
    other.mkdir()
    mount = mounted(lower, "upcall:1000:private")
    found = lower_folders([*mounts(), mount])
    assert above(lower / "below", found) == (mount, lower)
    assert above(other, found) is None


def test_a_mount_that_is_covered_or_out_of_reach_has_no_known_lower_folder(tmp_path: Path) -> None:
    covered = mounted(tmp_path, "upcall:1000:private", device=1)
    gone = mounted(tmp_path, "upcall:1000:other")._replace(point=str(tmp_path / "gone"))
    found = lower_folders([*mounts(), covered, gone])
    assert found.folders == {}
    assert found.hidden == ([covered, gone] if os.geteuid() in (0, 1000) else [])
