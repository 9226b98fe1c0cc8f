"""Whether nobody but root can change a program that root runs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path

_MAX_LINKS = 40  # as the kernel has it


def distrust(path: str, root: Path = Path("/"), owners: Collection[int] = (0,), may_miss: bool = False) -> str:
    """Why others than `owners` could change what is at this absolute path below `root`, or "".

    The file, every folder above it and every symbolic link on the way must be theirs, with nothing writable by group
    or others (which an access control list shows as writable by the group). `may_miss`: what is not there is no fault.
    """
    try:
        return _walk(path, root, owners)
    except FileNotFoundError as error:
        return "" if may_miss else f"{_shown(str(error.filename), root)} is not there"
    except OSError as error:
        return f"{_shown(str(error.filename), root)}: {error.strerror}"


def _walk(path: str, root: Path, owners: Collection[int]) -> str:
    here, left, links = root, _parts(path), 0
    while True:
        found = here.lstat()
        if found.st_uid not in owners:
            return f"{_shown(str(here), root)} belongs to uid {found.st_uid}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(here))
            target = str(here.readlink())
            here, left = root if target.startswith("/") else here.parent, left + _parts(target)
            continue
        if found.st_mode & 0o022:
            return f"{_shown(str(here), root)} has mode {stat.S_IMODE(found.st_mode):04o}: others can write to it"
        if not left:
            return "" if stat.S_ISREG(found.st_mode) else f"{_shown(str(here), root)} is not a regular file"
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(here))
        part = left.pop()
        # No link is ever left behind in `here`, so its parent is what ".." means; above the root is the root.
        here = (here.parent if here != root else root) if part == ".." else here / part


def _parts(path: str) -> list[str]:
    """The last first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _shown(path: str, root: Path) -> str:
    """As it is called below `root`."""
    return path if root == Path("/") else "/" + path.removeprefix(str(root)).lstrip("/")
