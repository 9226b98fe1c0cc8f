"""Maps device numbers to filesystems and mount points, and uids, gids and project ids to names.

Source: proc(5) for mountinfo, projid(5). Looking up names may block on a directory service: not for a loop's thread.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from upcall.kernel.procfs import MOUNTINFO

PROJECTS: Final = Path("/etc/projid")
_NAMES, _NAMES_AGE = 1024, 600.0  # cached names, and seconds of their validity

_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo. `device`: the number as in os.stat."""

    device: int
    root: str  # the mounted folder of the filesystem: "/" unless it is a bind mount or a container's
    point: str
    type: str
    source: str
    options: frozenset[str]
    parent: int = 0  # id of the mount that it lies on

    @property
    def is_users_fuse(self) -> bool:
        """Whether a user's process answers for this filesystem, when it wants to. Root's has user_id=0."""
        return self.type.partition(".")[0] in ("fuse", "fuseblk") and "user_id=0" not in self.options


def take_mounts(text: bytes) -> list[Mount]:
    """Parses a mountinfo file; malformed lines are skipped."""
    return list(numbered_mounts(text).values())


def numbered_mounts(text: bytes) -> dict[int, Mount]:
    """Returns the same by the mounts' ids, in the file's order."""
    found = {}
    for line in text.split(b"\n"):
        before, dash, after = line.partition(b" - ")
        fields, last = before.split(b" "), after.split(b" ")
        if not dash or len(fields) < 6 or len(last) < 2:
            continue
        with contextlib.suppress(ValueError, OverflowError):
            major, _, minor = fields[2].partition(b":")
            options = {*fields[5].split(b","), *(last[2].split(b",") if len(last) > 2 else ())}
            found[int(fields[0])] = Mount(
                os.makedev(int(major), int(minor)),
                _unescaped(fields[3]),
                _unescaped(fields[4]),
                _unescaped(last[0]),
                _unescaped(last[1]),
                frozenset(map(os.fsdecode, options)),
                int(fields[1]),
            )
    return found


def _unescaped(field: bytes) -> str:
    """Decodes a field, in which blanks, tabs, newlines and backslashes are \\040, \\011, \\012 and \\134."""
    return os.fsdecode(_ESCAPED.sub(lambda m: bytes((int(m[1], 8) & 0xFF,)), field))


def mounts(path: Path = MOUNTINFO) -> list[Mount]:
    """Returns the mounts in this process's mount namespace. OSError."""
    return take_mounts(path.read_bytes())


class Changes:
    """Detects mounts and unmounts: the kernel reports each change once by POLLPRI (proc(5))."""

    def __init__(self, path: Path = MOUNTINFO) -> None:
        self._file = path.open("rb", buffering=0)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLPRI)
        self.seen()

    def seen(self) -> bool:
        """Returns whether mounts have changed since the last call."""
        return bool(self._poll.poll(0))


class Names:
    """Looks up and caches the names of numbers; the number as text if it has no name. May block."""

    def __init__(self, projects: Path = PROJECTS) -> None:
        self._projects = projects
        self._known: dict[tuple[Callable[[int], str], int], tuple[float, str]] = {}

    def user(self, uid: int) -> str:
        """Returns the name of a uid."""
        return self._of(_user, uid)

    def group(self, gid: int) -> str:
        """Returns the name of a gid."""
        return self._of(_group, gid)

    def project(self, number: int) -> str:
        """Returns the name of a project id."""
        return self._of(self._project, number)

    def subject(self, kind: int, number: int) -> str:
        """Returns the name of a number of this quota type of the kernel's."""
        return (self.user, self.group, self.project)[kind](number)

    def _of(self, look: Callable[[int], str], number: int) -> str:
        now = time.monotonic()
        when, name = self._known.pop((look, number), (-_NAMES_AGE, ""))
        if now - when >= _NAMES_AGE:
            try:
                when, name = now, look(number)
            except (KeyError, OSError, ValueError, OverflowError):
                when, name = now, str(number)
        if len(self._known) >= _NAMES:
            del self._known[next(iter(self._known))]  # the least recently used
        self._known[look, number] = when, name
        return name

    def _project(self, number: int) -> str:
        """Returns a project's name. KeyError if it has none."""
        for name, value in _projects(self._projects):
            if value == str(number):
                return name
        raise KeyError(number)


def project_number(name: str, projects: Path = PROJECTS) -> int:
    """Returns the id of a project by its name. KeyError, OSError; ValueError if the file is malformed."""
    for one, value in _projects(projects):
        if one == name:
            return int(value)
    raise KeyError(name)


def _projects(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (name, number) of `name:number` lines; # begins a comment."""
    for line in file.read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition("#")[0].strip().rpartition(":")
        yield name, value


def _user(uid: int) -> str:
    return pwd.getpwuid(uid).pw_name


def _group(gid: int) -> str:
    return grp.getgrgid(gid).gr_name
