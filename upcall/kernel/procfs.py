"""What proc(5) says of processes: bounded reads, and what a pid can be relied on for.

A pid is another process's as soon as its own has ended and was waited for. So a reader names the process by pid and
start time (`started_at`), which together are never used twice in one boot; or holds a pidfd (`held`) or the process's
folder (`ProcessFolder`) and reads again or through it.
A process chooses its own name, which stands in `stat` and `status`. The kernel escapes line feeds there, but not
VT, FF, CR, FS, blanks and parentheses: hence no str.splitlines(), and the last parenthesis ends the name in `stat`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final, NamedTuple, Self

MOUNTINFO: Final = Path("/proc/self/mountinfo")
KEYS: Final = Path("/proc/keys")
LAST_CAPABILITY: Final = Path("/proc/sys/kernel/cap_last_cap")
MOST: Final = 8192  # bytes: `status` of a process with 64 groups has two thousand; what we read stands in its first
STATE, PARENT, STARTED = 0, 1, 19  # fields of `stat` behind the name

# The first line holds the name, whose line feeds are escaped.
_IDS = re.compile(rb"^Tgid:\t(\d+)\n.*?^Uid:\t(\d+)\t(\d+)\t", re.MULTILINE | re.DOTALL)
_UID = re.compile(rb"^Uid:\t(\d+)\t", re.MULTILINE)
_PARENT = re.compile(rb"^PPid:\t(\d+)$", re.MULTILINE)


class ThreadIds(NamedTuple):
    """Of `status`: the process that a thread belongs to, and its real and effective uid."""

    process: int
    uid: int
    euid: int


def read(pid: int, name: str) -> bytes:
    """The first MOST bytes of /proc/PID/NAME. ProcessLookupError if there is no such process; OSError."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)  # on the hot path: no Path
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"pid {pid}") from None


def stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on. ProcessLookupError."""
    return stat_in(read(pid, "stat"))


def stat_in(text: bytes) -> list[bytes]:
    """The same, of the text of such a file."""
    return text.rpartition(b")")[2].split()


def started_at(pid: int) -> int:
    """When a process or thread began, in clock ticks since boot. ProcessLookupError."""
    return int(stat(pid)[STARTED])


def state(pid: int) -> str:
    """One letter: "T" is stopped, "Z" has ended. Empty if there is no such process."""
    try:
        return stat(pid)[STATE].decode("ascii", "replace")
    except (OSError, IndexError):
        return ""


def ids(pid: int) -> ThreadIds:
    """Of a process or thread. ProcessLookupError."""
    found = _IDS.search(read(pid, "status"))  # on the hot path: the file has sixty lines
    if found is None:
        raise ProcessLookupError(f"pid {pid}")
    return ThreadIds._make(map(int, found.groups()))


def real_uid(pid: int) -> int | None:
    """The real uid of a process; None if there is none with this pid."""
    try:
        return real_uid_in(read(pid, "status"))
    except OSError:
        return None


def real_uid_in(status: bytes) -> int | None:
    """The same, of the text of such a file."""
    found = _UID.search(status)
    return int(found[1]) if found else None


def parent_in(status: bytes) -> int:
    """The parent's pid; 0 if the text names none."""
    found = _PARENT.search(status)
    return int(found[1]) if found else 0


def hold(pid: int) -> tuple[int, int]:
    """(pidfd, pid) of the process that a thread belongs to. ProcessLookupError; OSError.

    Before Linux 6.9 there is no pidfd of another thread than a process's first. What was read of `pid` before is to be
    read again after it.
    """
    try:
        return os.pidfd_open(pid), pid
    except ProcessLookupError:
        raise
    except OSError:  # not the first of its threads
        process = ids(pid).process
        return os.pidfd_open(process), process


class ProcessFolder:
    """/proc/PID, opened once: when the process has ended all reads fail, and none tells of another of the same pid."""

    def __init__(self, pid: int) -> None:
        """OSError if there is none that we may look at."""
        self._fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def read(self, name: str) -> bytes:
        """The first MOST bytes. OSError."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)

    def link(self, name: str) -> str:
        """Where a link leads; empty if we may not know."""
        with contextlib.suppress(OSError):
            return os.readlink(name, dir_fd=self._fd)
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


# --- our own threads and children ------------------------------------------------------------------------------


def tasks(pid: int | None = None) -> list[int]:
    """The threads of a process, of this one by default; none if it has ended."""
    try:
        return [int(folder.name) for folder in Path(f"/proc/{_or_self(pid)}/task").iterdir()]
    except OSError:
        return []


def task_text(task: int, name: str, pid: int | None = None) -> bytes:
    """A thread's file, as far as `MOST`; empty if it has ended, or may not be looked at."""
    try:
        fd = os.open(f"/proc/{_or_self(pid)}/task/{task}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)
    except OSError:
        return b""


def children(pid: int | None = None) -> list[int]:
    """What the threads of a process have started and not yet waited for. Of a thread with a thousand the first."""
    found = (task_text(task, "children", pid) for task in tasks(pid))
    return [int(child) for text in found for child in text[: text.rfind(b" ") + 1].split()]  # a blank ends each


def _or_self(pid: int | None) -> int | str:
    return "self" if pid is None else pid
