"""Writes one record per settled request to stderr, systemd's journal, or a file. Off by default.

It does not block: a thread writes. Records that do not fit into the queue, or exceed the rate limit, are counted as
lost.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Final

from upcall import config
from upcall.core.errors import UsageError
from upcall.kernel import journal
from upcall.process.log import EventLog, standard_error
from upcall.process.log_writer import Outbox
from upcall.wire.record import Record, fields_of, line_of

NO, STDERR, JOURNAL = "no", "stderr", "journal"
MODE: Final = 0o640

_PER_SECOND = 1000  # records, a limit so that no user can fill the disk
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class RecordFile:
    """A file to append to. If it was renamed or removed, as by logrotate, it is created again before the next line."""

    def __init__(self, path: Path) -> None:
        """OSError if it cannot be written, is not a regular file, or belongs to another user."""
        self._path = path
        self._fd, self._inode = self._open()
        self._torn = False

    def _open(self) -> tuple[int, int]:
        fd = os.open(self._path, _OPEN, MODE)
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return fd, found.st_ino
        os.close(fd)
        raise PermissionError(errno.EPERM, "is not a regular file of ours", str(self._path))

    def write(self, data: bytes) -> None:
        """Appends whole lines. After a line that a full disk has cut, a new line begins. OSError."""
        self._follow()
        if self._torn:
            data = b"\n" + data
        written = os.write(self._fd, data)
        self._torn = written < len(data)

    def _follow(self) -> None:
        try:
            if self._path.lstat().st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        fd, inode = self._open()
        os.close(self._fd)
        self._fd, self._inode, self._torn = fd, inode, False


class Recorder:
    """`record(uid, service, outcome, seconds, seq, handler)` writes a record asynchronously; it does not block."""

    def __init__(self, name: str, where: str, socket: Path = journal.JOURNAL) -> None:
        """`where`: "stderr", "journal", or the absolute path of a file. OSError if it cannot be opened."""
        self._name, self._socket = name, socket
        self._prefix = f"{name}[{os.getpid()}]: "
        self._second, self._in_second = 0.0, 0
        self._file = RecordFile(Path(where)) if where not in (STDERR, JOURNAL) else None
        self._fd = standard_error()
        self._outbox: Outbox[Record] = Outbox(self._send_fields if where == JOURNAL else self._send_line)

    def __call__(self, uid: int, service: str, outcome: str, seconds: float, seq: int, handler: str = "") -> None:
        now = time.time()
        if not 0 <= now - self._second < 1:
            self._second, self._in_second = now, 0
        self._in_second += 1
        if self._in_second > _PER_SECOND:
            self._outbox.lose()
        else:
            self._outbox.put(Record(now, uid, service, outcome, max(0.0, seconds), seq, handler))

    def _send_line(self, record: Record, lost: int) -> None:
        text = f"{self._prefix}{line_of(record)}\n" + (f"{self._prefix}lost records={lost}\n" if lost else "")
        data = text.encode("utf-8", "backslashreplace")
        if self._file is not None:
            self._file.write(data)
        else:
            os.write(self._fd, data)

    def _send_fields(self, record: Record, lost: int) -> None:
        journal.send(self._socket, fields_of(record, self._name).items())
        if lost:
            note = {"MESSAGE": f"{lost} records of requests were lost", "PRIORITY": 4, "SYSLOG_IDENTIFIER": self._name}
            journal.send(self._socket, note.items())

    def flush(self) -> None:
        """Waits until all records are written, at most a second. Only when the process ends."""
        self._outbox.flush()


def wanted(option: str | None, user: bool) -> str:
    """Returns where records go: `option`, the command line's option, otherwise as configured. ConfigError."""
    if option is not None:
        return option
    settings = config.settings("log", user)
    return str(settings.get("to", STDERR)) if settings.get("requests", False) else NO


def check_where(where: str) -> str:
    """Returns `where`; UsageError if it is neither "no", "stderr", "journal" nor an absolute path."""
    if where in (NO, STDERR, JOURNAL) or where.startswith("/"):
        return where
    raise UsageError(f"{where!r}: must be no, stderr, journal or the absolute path of a file")


def recorder(name: str, where: str, log: EventLog) -> Recorder | None:
    """Returns a recorder; None if `where` is "no". If it cannot be opened, logs that and returns None: requests are
    served without records."""
    if where == NO:
        return None
    try:
        return Recorder(name, where)
    except OSError as error:
        log("record-failed", to=where, why=error.strerror or error)
        return None
