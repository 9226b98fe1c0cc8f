"""Reads /proc with bounded reads, and identifies processes despite reuse of their pids. Source: proc(5).

A pid can be reused as soon as its process has ended and was waited for. So readers identify a process by pid and start
time (`started_at`), which together are unique in one boot; or they hold a pidfd (`hold`) or the process's folder
(`ProcessFolder`) and read after that, or through it. A process chooses its own name, which `stat` and `status`
contain. The kernel escapes line feeds in it, but not VT, FF, CR, FS, blanks and parentheses: hence no
str.splitlines(), and the last parenthesis ends the name in `stat`.
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
MOST: Final = 8192  # bytes; `status` of a process with 64 groups has two thousand, and the fields read here come first
STATE, PARENT, STARTED = 0, 1, 19  # fields of `stat` after the name

# The first line contains the name, in which line feeds are escaped.
_IDS = re.compile(rb"^Tgid:\t(\d+)\n.*?^Uid:\t(\d+)\t(\d+)\t", re.MULTILINE | re.DOTALL)
_UID = re.compile(rb"^Uid:\t(\d+)\t", re.MULTILINE)
_PARENT = re.compile(rb"^PPid:\t(\d+)$", re.MULTILINE)


class ThreadIds(NamedTuple):
    """From `status`: the process that a thread belongs to, and its real and effective uid."""

    process: int
    uid: int
    euid: int


def read(pid: int, name: str) -> bytes:
    """Returns the first MOST bytes of /proc/PID/NAME. ProcessLookupError if there is no such process; OSError."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)  # on the hot path: no Path
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"pid {pid}") from None


def stat(pid: int) -> list[bytes]:
    """Returns the fields of /proc/PID/stat from the state on. ProcessLookupError."""
    return stat_in(read(pid, "stat"))


def stat_in(text: bytes) -> list[bytes]:
    """Returns the same from the content of such a file."""
    return text.rpartition(b")")[2].split()


def started_at(pid: int) -> int:
    """Returns the start time of a process or thread in clock ticks since boot. ProcessLookupError."""
    return int(stat(pid)[STARTED])


def state(pid: int) -> str:
    """Returns the state as one letter: "T" is stopped, "Z" has ended. Empty if there is no such process."""
    try:
        return stat(pid)[STATE].decode("ascii", "replace")
    except (OSError, IndexError):
        return ""


def stopped(pid: int) -> bool:
    """Returns whether every thread of a process has stopped: SIGSTOP reaches them one after the other."""
    try:
        return all(state(int(task.name)) == "T" for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def ids(pid: int) -> ThreadIds:
    """Returns the ids of a process or thread. ProcessLookupError."""
    found = _IDS.search(read(pid, "status"))  # on the hot path: the file has sixty lines
    if found is None:
        raise ProcessLookupError(f"pid {pid}")
    return ThreadIds._make(map(int, found.groups()))


def real_uid(pid: int) -> int | None:
    """Returns the real uid of a process; None if there is no such process."""
    try:
        return real_uid_in(read(pid, "status"))
    except OSError:
        return None


def real_uid_in(status: bytes) -> int | None:
    """Returns the same from the content of /proc/PID/status; None if it has no such line."""
    found = _UID.search(status)
    return int(found[1]) if found else None


def parent_in(status: bytes) -> int:
    """Returns the parent's pid from the content of /proc/PID/status; 0 if it has no such line."""
    found = _PARENT.search(status)
    return int(found[1]) if found else 0


def hold(pid: int) -> tuple[int, int]:
    """Returns (pidfd, pid) of the process that a thread belongs to. ProcessLookupError; OSError.

    Before Linux 6.9 only a process's first thread has a pidfd. Data read of `pid` before this call must be read again
    after it.
    """
    try:
        return os.pidfd_open(pid), pid
    except ProcessLookupError:
        raise
    except OSError:  # not the first thread of its process
        process = ids(pid).process
        return os.pidfd_open(process), process


class ProcessFolder:
    """/proc/PID, opened once. After the end of the process all reads fail, also if the pid is reused."""

    def __init__(self, pid: int) -> None:
        """OSError if there is no such process, or it is not accessible."""
        self._fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def read(self, name: str) -> bytes:
        """Returns the first MOST bytes of a file. OSError."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)

    def link(self, name: str) -> str:
        """Returns the target of a link; empty if it is not accessible."""
        with contextlib.suppress(OSError):
            return os.readlink(name, dir_fd=self._fd)
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


# --- threads and children --------------------------------------------------------------------------------------


def tasks(pid: int | None = None) -> list[int]:
    """Returns the threads of a process, by default of this one; empty if it has ended."""
    try:
        return [int(folder.name) for folder in Path(f"/proc/{_or_self(pid)}/task").iterdir()]
    except OSError:
        return []


def task_text(task: int, name: str, pid: int | None = None) -> bytes:
    """Returns at most MOST bytes of a thread's file; empty if the thread has ended or is not accessible."""
    try:
        fd = os.open(f"/proc/{_or_self(pid)}/task/{task}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, MOST)
        finally:
            os.close(fd)
    except OSError:
        return b""


def children(pid: int | None = None) -> list[int]:
    """Returns the children of a process's threads that were not waited for; of a thread with a thousand, only the
    first."""
    found = (task_text(task, "children", pid) for task in tasks(pid))
    return [int(child) for text in found for child in text[: text.rfind(b" ") + 1].split()]  # a blank ends each


def _or_self(pid: int | None) -> int | str:
    return "self" if pid is None else pid
