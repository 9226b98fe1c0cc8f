"""Records the sessions of each uid and the daemon started for them: one file per uid, changed under one lock.

    daemon 4711 8812345
    session 4700 8812300

Each line is a process: its pid and its start time in clock ticks since boot, which together are unique. A process that
has ended is ignored, however it ended, so entries cannot become stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from upcall.kernel import procfs
from upcall.process.paths import SYSTEM_FOLDER, own_folder

FOLDER: Final = SYSTEM_FOLDER / "sessions"
_ENDED = (b"Z", b"X", b"x")  # proc(5): a zombie has ended, too


class SessionProcess(NamedTuple):
    """A process, identified by pid and start time."""

    pid: int
    started: int  # clock ticks since boot

    @property
    def lives(self) -> bool:
        """Whether this process still runs."""
        return process(self.pid) == self

    def end(self) -> None:
        """Sends SIGTERM to this process, and to no other one with the same pid."""
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(self.pid)
            try:
                if self.lives:
                    signal.pidfd_send_signal(fd, signal.SIGTERM)
            finally:
                os.close(fd)


def process(pid: int) -> SessionProcess | None:
    """Returns the process that has this pid now; None if it has ended."""
    try:
        fields = procfs.stat(pid)
    except ProcessLookupError:
        return None
    return None if fields[procfs.STATE] in _ENDED else SessionProcess(pid, int(fields[procfs.STARTED]))


class SessionRecord(NamedTuple):
    """The record of one uid."""

    daemon: SessionProcess | None = None
    sessions: tuple[SessionProcess, ...] = ()  # the applications that opened the sessions; one may occur several times


class Records:
    """The files of all uids. Call all methods under the lock, see `held`."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lock; blocks. OSError; UsageError if others can write to the folder."""
        own_folder(self._folder.parent, 0o755)
        own_folder(self._folder, 0o700)
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def opened(self, uid: int, who: SessionProcess, start: Callable[[], int], *, once: bool = False) -> None:
        """Counts a session; with `once`, only one per process. Calls `start`, which returns the pid of a daemon, if
        none is running. The session counts even if `start` raises OSError, which is passed on."""
        record = self.read(uid)
        if not (once and who in record.sessions):
            record = record._replace(sessions=(*record.sessions, who))
        self._write(uid, record)
        if record.daemon is None:
            self._write(uid, record._replace(daemon=process(start())))

    def closed(self, uid: int, who: SessionProcess) -> None:
        """Uncounts a session, and ends the daemon with the last one. A session that was not counted is ignored."""
        record = self.read(uid)
        left = list(record.sessions)
        if who in left:
            left.remove(who)
        self._settle(uid, record._replace(sessions=tuple(left)))

    def sweep(self) -> None:
        """Ends the daemons of uids whose sessions have all ended without being closed."""
        for path in self._folder.iterdir():
            if path.name.isdecimal():
                self._settle(int(path.name), self.read(int(path.name)))

    def _settle(self, uid: int, record: SessionRecord) -> None:
        if not record.sessions and record.daemon is not None:
            record.daemon.end()
        self._write(uid, record if record.sessions else SessionRecord())

    def read(self, uid: int) -> SessionRecord:
        """Returns the record with processes that are still running. Malformed lines are ignored."""
        daemon: SessionProcess | None = None
        sessions: list[SessionProcess] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._path(uid).read_text("ascii", "replace").splitlines():
                what, _, numbers = line.partition(" ")
                found = _process(numbers)
                if found is None or not found.lives:
                    continue
                if what == "daemon":
                    daemon = found
                elif what == "session":
                    sessions.append(found)
        return SessionRecord(daemon, tuple(sessions))

    def _write(self, uid: int, record: SessionRecord) -> None:
        """Replaces the file atomically."""
        path = self._path(uid)
        if record == SessionRecord():
            path.unlink(missing_ok=True)
            return
        lines = [] if record.daemon is None else [("daemon", *record.daemon)]
        lines += [("session", *one) for one in record.sessions]
        beside = path.with_suffix(".new")
        beside.write_text("".join(f"{what} {pid} {started}\n" for what, pid, started in lines), "ascii")
        beside.replace(path)

    def _path(self, uid: int) -> Path:
        return self._folder / str(uid)


def _process(numbers: str) -> SessionProcess | None:
    try:
        pid, started = map(int, numbers.split())
    except ValueError:
        return None
    return SessionProcess(pid, started)
