"""Tells which folders eCryptfs has mounted, from below and from above. Sees this process's mount namespace only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import UsageError
from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs.lower_file import Inode
from upcall.protocols.ecryptfs.mounting.messages import take_made

_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

# Filesystems of this machine's own, which answer at once. A FUSE of a user's might never do so.
_LOCAL: Final = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "reiserfs", "tmpfs", "xfs", "zfs"}
)


class Lowers(NamedTuple):
    """Lower folders of mounts. `hidden`: mounts whose lower folder cannot be told, and may hold files of this user."""

    folders: dict[Inode, Mount]
    hidden: list[Mount]


def lower_folders(mounts: Collection[Mount]) -> Lowers:
    """Returns the lower folders of eCryptfs's mounts. Those that this process cannot reach are left out: its own files
    are not in them."""
    lowers = Lowers({}, [])
    for mount in mounts:
        if mount.type == "ecryptfs":
            try:
                if mount.source.startswith("/"):
                    lowers.folders[_inode(Path(mount.source).stat())] = mount
                    continue
                below = _below(mount, mounts)
            except OSError:
                below = []
            lowers.folders.update(dict.fromkeys(below, mount))
            made = take_made(mount.source)
            if not below and (made is None or os.geteuid() in (0, made.uid)):
                lowers.hidden.append(mount)
    return lowers


def _below(mount: Mount, mounts: Collection[Mount]) -> list[Inode]:
    """Returns the lower folder of a mount whose source does not name it, as of those by `upcall mount`; nothing if
    another mount hides it. eCryptfs gives its root the inode number of the lower folder, and the figures of the lower
    filesystem (fs/ecryptfs/inode.c, super.c). More than one folder if filesystems have the same figures; that number
    on any filesystem if it is none of this machine's own. OSError."""
    root = Path(mount.point).stat()
    if root.st_dev != mount.device:
        return []  # something else is mounted on it
    found: list[Inode] = []
    figures = _figures(mount.point)
    for point in {one.device: one.point for one in mounts if one.type in _LOCAL}.values():
        with contextlib.suppress(OSError):
            if _figures(point) == figures:
                found.append((Path(point).stat().st_dev, root.st_ino))
    return found or [(None, root.st_ino)]


def _figures(path: str) -> tuple[int, int, int]:
    found = os.statvfs(path)
    return found.f_fsid, found.f_blocks, found.f_files


def _inode(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino


def check_unmounted(path: Path, top: int, lowers: Lowers) -> None:
    """UsageError if `path`, whose folder `top` is a descriptor of, is in a lower folder that is mounted, or if that
    cannot be told. OSError."""
    if found := mount_above(top, lowers):
        mount, folder = found
        made = take_made(mount.source)
        own = made is not None and made.uid == os.geteuid()
        how = f"unmount it first (upcall umount {made.name})" if made and own else "unmount it first"
        raise UsageError(f"{path}: eCryptfs has {folder} mounted at {mount.point}: {how}, or add --mounted")
    for mount in lowers.hidden:
        raise UsageError(
            f"{path}: it cannot be told whether it is in the lower folder of {mount.source}, which is mounted at "
            f"{mount.point}: unmount that first, or add --mounted"
        )


def mount_above(top: int, lowers: Lowers) -> tuple[Mount, Path] | None:
    """Returns the mount whose lower folder is the one that `top` is a descriptor of, or one that it lies in, and that
    folder. OSError."""
    here, last = os.open(".", _PATH, dir_fd=top), None
    try:
        while (inode := _inode(os.fstat(here))) != last:
            if mount := lowers.folders.get(inode) or lowers.folders.get((None, inode[1])):
                return mount, Path(f"/proc/self/fd/{here}").readlink()
            last, below = inode, here
            here = os.open("..", _PATH, dir_fd=below)
            os.close(below)
        return None
    finally:
        os.close(here)


def mount_of(device: int, mounts: Collection[Mount]) -> Mount | None:
    """Returns eCryptfs's mount that has this device number: files are in clear there."""
    return next((mount for mount in mounts if mount.type == "ecryptfs" and mount.device == device), None)
