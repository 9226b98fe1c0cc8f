"""Tells which folders eCryptfs has mounted, from below and from above. Sees this process's mount namespace only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs.lower_file import Inode


def lower_folders(mounts: Iterable[Mount]) -> dict[Inode, Mount]:
    """Returns the lower folders of eCryptfs's mounts. Those that this process cannot reach are left out: its own files
    are not in them."""
    folders: dict[Inode, Mount] = {}
    for mount in mounts:
        if mount.type == "ecryptfs":
            try:
                found = Path(mount.source).stat()
            except OSError:
                continue
            folders[found.st_dev, found.st_ino] = mount
    return folders


def mount_above(path: Path, lowers: dict[Inode, Mount]) -> Mount | None:
    """Returns the mount whose lower folder is `path`, or one that it lies in. OSError."""
    resolved = Path(os.path.realpath(path))
    for folder in (resolved, *resolved.parents):
        found = folder.stat()
        if mount := lowers.get((found.st_dev, found.st_ino)):
            return mount
    return None


def mount_of(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """Returns eCryptfs's mount that `path` itself is on: it is in clear there. OSError."""
    device = path.lstat().st_dev
    return next((mount for mount in mounts if mount.type == "ecryptfs" and mount.device == device), None)
