"""Whether a file with credentials can be believed: whoever can plant one makes us act in another name."""

from __future__ import annotations

import os
import stat
from typing import Final

from upcall.core.errors import UpcallError

CACHE: Final = 0o077  # rights that nobody else may have to a cache of tickets
KEYTAB: Final = 0o022  # to a keytab: some are read by a group of services


class NotTrusted(UpcallError):
    """A file that others could have put there, or can read or write. The text says why, and not which."""


def trusted(path: str, owners: tuple[int, ...], forbidden: int) -> str:
    """The path by which it can be opened: without symbolic links, through folders that only these owners can change.

    NotTrusted says what is wrong; FileNotFoundError and other OSErrors come through. Nobody but the owners can put
    something else there between this and the opening.
    """
    if not path.startswith("/"):
        raise NotTrusted("not an absolute path")
    folder, base = os.path.split(path)
    if not _folders_are_safe(folder, owners):
        folder = os.path.realpath(folder)
        if not _folders_are_safe(folder, owners):
            raise NotTrusted(f"{folder}: is changing")
    real = os.path.join(folder, base)  # noqa: PTH118 - a third of Path's cost
    found = os.lstat(real)
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise NotTrusted(kind)
    if found.st_uid not in owners:
        raise NotTrusted(f"belongs to uid {found.st_uid}")
    if found.st_mode & forbidden:
        raise NotTrusted(f"mode {stat.S_IMODE(found.st_mode):04o} lets others in")
    return real


def _folders_are_safe(folder: str, owners: tuple[int, ...]) -> bool:
    """False if one of them is a symbolic link; NotTrusted if others could put another in its place.

    In a sticky folder others can add files, but not move or remove ours.
    """
    while True:
        found = os.lstat(folder)
        if stat.S_ISLNK(found.st_mode):
            return False
        if found.st_uid not in (0, *owners):
            raise NotTrusted(f"{folder}: belongs to uid {found.st_uid}, who could replace what is in it")
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise NotTrusted(f"{folder}: mode {stat.S_IMODE(found.st_mode):04o} lets others replace what is in it")
        if not folder.strip("/"):
            return True
        folder = os.path.dirname(folder)  # noqa: PTH120
