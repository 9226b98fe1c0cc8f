"""Which uids are one person's: /etc/subuid, read at the start, on SIGHUP and when it has changed.

User names are looked up while it is read, which may wait for a directory: never in the loop's thread but at the start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from upcall.core.contexts import Line
from upcall.kernel import ancestry
from upcall.process.reload import Reloading
from upcall.wire.subuid import Ranges, take_subuid

if TYPE_CHECKING:
    from upcall.process.log import EventLog

SUBUID: Final = Path("/etc/subuid")
_MOST = 4 << 20  # bytes
_LOOKED_EVERY = 2.0  # seconds between two looks at whether the file has changed

_Version = tuple[int, int, int] | None


class People:
    """`of(uid)` is the person's uid. The file is not believed if others than root could have written it."""

    def __init__(self, log: EventLog, path: Path | None = None, line_of: Callable[[int], Line] | None = None) -> None:
        """`line_of`: from whom a process descends, if not as the kernel says."""
        self.line_of = line_of or ancestry.line_of
        self._log, self._path = log, path or SUBUID
        self._ranges = Ranges()
        self._version: _Version = None
        self._look_at = 0.0
        self._reading = Reloading(self.read)
        self.read()

    def of(self, uid: int) -> int:
        return self._ranges.of(uid)

    def look(self, now: float) -> None:
        """Has the file read again if it has changed. Waits for nothing; cheap to call often."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOKED_EVERY
        if _version(self._path) != self._version:
            self._reading.ask()

    def reread(self) -> None:
        """Has it read again: a user's name may be another uid's now."""
        self._reading.ask()

    def read(self) -> None:
        """In any thread. What was read before holds if it cannot be read, or must not be believed."""
        self._version = _version(self._path)
        try:
            text = self._text()
        except FileNotFoundError:
            self._ranges = Ranges()
            return
        except OSError as error:
            self._log("subuid-refused", path=self._path, why=error)
            return
        ranges, skipped = take_subuid(text, _uid_of)
        self._ranges = ranges
        if skipped:
            self._log("subuid-lines-skipped", path=self._path, lines=skipped, ranges=len(ranges))

    def _text(self) -> str:
        """OSError; PermissionError if it is not root's, or others may write it."""
        with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                raise PermissionError("not a regular file that only root can write")
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            self._log("subuid-cut", path=self._path, bytes=_MOST)
            data = data[: data.rfind(b"\n", 0, _MOST) + 1]
        return data.decode("utf-8", "replace")


def _version(path: Path) -> _Version:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _uid_of(name: str) -> int | None:
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        return None
