"""Maps uids to persons by /etc/subuid, which is read at start-up, on SIGHUP and after changes.

Reading looks up user names, which may block on a name service: except at start-up, not in the loop's thread.
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
_LOOKED_EVERY = 2.0  # seconds between checks whether the file has changed

_Version = tuple[int, int, int] | None


class People:
    """`of(uid)` returns the person's uid. The file is ignored if users other than root can write it."""

    def __init__(self, log: EventLog, path: Path | None = None, line_of: Callable[[int], Line] | None = None) -> None:
        """`line_of`: returns a process and its ancestors, for self-deadlock detection; by default from /proc."""
        self.line_of = line_of or ancestry.line_of
        self._log, self._path = log, path or SUBUID
        self._ranges = Ranges()
        self._version: _Version = None
        self._look_at = 0.0
        self._reading = Reloading(self.read)
        self.read()

    def of(self, uid: int) -> int:
        """Returns the person that a uid belongs to, by its uid. Any thread."""
        return self._ranges.of(uid)

    def look(self, now: float) -> None:
        """Starts reading the file again if it has changed. Does not block; checks at most every 2 seconds."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOKED_EVERY
        if _version(self._path) != self._version:
            self._reading.ask()

    def reread(self) -> None:
        """Starts reading the file again, also if it has not changed: user names may have other uids now."""
        self._reading.ask()

    def read(self) -> None:
        """Reads the file, in any thread; may block. Keeps the previous ranges if it is unreadable or not trusted."""
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
        """Returns the file's text. OSError; PermissionError if its owner is not root, or others may write it."""
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
