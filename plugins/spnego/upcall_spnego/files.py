"""Checks that credential files can be trusted: a planted file would make the daemon use another identity."""

from __future__ import annotations

import os
import stat
from typing import Final

from upcall.core.errors import UpcallError

CACHE: Final = 0o077  # forbidden permissions of a credential cache
KEYTAB: Final = 0o022  # forbidden permissions of a keytab; groups of services may read it


class NotTrusted(UpcallError):
    """Other users could have put the file there, or can access it. The text gives the reason, without the path."""


def trusted(path: str, owners: tuple[int, ...], forbidden: int) -> str:
    """Returns a path by which the file can be opened: without symbolic links, through folders that only `owners`
    (uids) can change. So other users cannot replace the file before it is opened.

    `forbidden`: permission bits that the file must not have. NotTrusted; OSError, such as FileNotFoundError.
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
    """Checks a folder and those above it. False if one is a symbolic link; NotTrusted if other users could replace
    one.

    Sticky folders are allowed: other users can add files there, but not replace ours.
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
