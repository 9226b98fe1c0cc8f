"""Tells which folders eCryptfs has mounted, from below and from above. Sees this process's mount namespace only."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs.lower_file import Inode

# Filesystems of this machine's own, which answer at once. A FUSE of a user's might never do so.
_LOCAL: Final = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "reiserfs", "tmpfs", "xfs", "zfs"}
)


def lower_folders(mounts: Collection[Mount]) -> dict[Inode, Mount]:
    """Returns the lower folders of eCryptfs's mounts. Those that this process cannot reach are left out: its own files
    are not in them."""
    folders: dict[Inode, Mount] = {}
    for mount in mounts:
        if mount.type == "ecryptfs":
            try:
                if mount.source.startswith("/"):
                    found = Path(mount.source).stat()
                    folders[found.st_dev, found.st_ino] = mount
                else:
                    folders |= dict.fromkeys(_below(mount, mounts), mount)
            except OSError:
                continue
    return folders


def _below(mount: Mount, mounts: Collection[Mount]) -> Iterator[Inode]:
    """Yields the lower folder of a mount whose source does not name it, as of those by `upcall mount`. eCryptfs gives
    its root the inode number of the lower folder, and the figures of the lower filesystem (fs/ecryptfs/inode.c,
    super.c). More than one folder if filesystems have the same figures. OSError."""
    root, figures = Path(mount.point).stat(), _figures(mount.point)
    if root.st_dev != mount.device:
        return  # something else is mounted on it
    for point in {one.device: one.point for one in mounts if one.type in _LOCAL}.values():
        try:
            if _figures(point) == figures:
                yield Path(point).stat().st_dev, root.st_ino
        except OSError:
            continue


def _figures(path: str) -> tuple[int, int, int]:
    found = os.statvfs(path)
    return found.f_fsid, found.f_blocks, found.f_files


def mount_above(path: Path, lowers: dict[Inode, Mount]) -> Mount | None:
    """Returns the mount whose lower folder is `path`, or one that it lies in. OSError."""
    resolved = Path(os.path.realpath(path))
    for folder in (resolved, *resolved.parents):
        found = folder.stat()
        if mount := lowers.get((found.st_dev, found.st_ino)):
            return mount
    return None


def mount_of(path: Path, mounts: Collection[Mount]) -> Mount | None:
    """Returns eCryptfs's mount that `path` itself is on: it is in clear there. OSError."""
    device = path.lstat().st_dev
    return next((mount for mount in mounts if mount.type == "ecryptfs" and mount.device == device), None)
