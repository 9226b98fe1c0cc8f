"""Logs events without blocking: one line per event, written by a thread; lines that do not fit are counted.

Rate limit: a number of lines per second for each event word of each person, and one for all persons together. Events
of root and events without a uid are not counted in the latter. What is suppressed is counted and logged, with its uid.
Not the standard library's QueueHandler: it formats in the caller, and its queue grows without bound or blocks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from upcall.process.log_writer import Outbox
from upcall.wire.logfmt import shown

_PER_SECOND = 20  # lines of one event of one person
_OF_PERSON = 60  # lines of all events of one person; root is exempt
_IN_ALL = 200  # lines of all persons together but root; below the rate of a slow terminal or journald
_KEPT = 2048  # (event, person) counted separately within a second
_SUMMARIES = 32  # lines about suppressed events

_Key = tuple[str, int | None]


class EventLog:
    """`log("event", key=value, ...)` writes `name[pid]: event key=value` to a descriptor, asynchronously.

    Events are named noun-verb: "device-write-failed". Any thread may call it; it never blocks. `fd`: standard error by
    default. `person_of`: maps a uid to the person whose rate limit applies; set by processes that read /etc/subuid.
    """

    def __init__(self, name: str, fd: int | None = None) -> None:
        self._prefix = f"{name}[{os.getpid()}]: "
        self._fd = standard_error() if fd is None else fd
        self.person_of: Callable[[int], int] = lambda uid: uid
        self._began = -1.0  # start of the second that is being counted
        self._seen: dict[_Key, int] = {}  # events in this second
        self._suppressed: dict[_Key, int] = {}
        self._lines = 0  # of all persons but root
        self._mine: dict[int, int] = {}  # by person: lines
        self._others = 0  # suppressed, not counted separately
        self._outbox: Outbox[str] = Outbox(self._write)

    def __call__(self, event: str, /, **fields: object) -> None:
        now = time.monotonic()
        if now - self._began >= 1:
            self._summarise()
            self._began = now
        uid = fields.get("uid")
        person = self.person_of(uid) if isinstance(uid, int) else None
        if self._takes((event, person)):
            self._outbox.put(" ".join([event, *(f"{key}={shown(value)}" for key, value in fields.items())]))

    def _takes(self, key: _Key) -> bool:
        """Counts an event; returns whether the rate limit lets it be written."""
        seen = self._seen.get(key, 0)
        if not seen and len(self._seen) >= _KEPT and key[1]:
            self._others += 1
            return False
        self._seen[key] = seen + 1
        person = key[1] or 0
        mine = self._mine.get(person, 0)
        if seen < _PER_SECOND and (not person or (mine < _OF_PERSON and self._lines < _IN_ALL)):
            if person:
                self._lines += 1
                self._mine[person] = mine + 1
            return True
        self._suppressed[key] = self._suppressed.get(key, 0) + 1
        return False

    def _summarise(self) -> None:
        """Logs how many events were suppressed in the last second, most frequent first, and resets the counters."""
        suppressed, self._suppressed, self._seen = self._suppressed, {}, {}
        others, self._others, self._lines, self._mine = self._others, 0, 0, {}
        most = sorted(suppressed.items(), key=lambda one: -one[1])
        for (event, person), count in most[:_SUMMARIES]:
            whose = "" if person is None else f" uid={person}"
            self._outbox.put(f"{event}{whose} suppressed={count}")
        others += sum(count for _, count in most[_SUMMARIES:])
        if others:
            self._outbox.put(f"events suppressed={others}")

    def _write(self, line: str, lost: int) -> None:
        text = f"{self._prefix}{line}\n" + (f"{self._prefix}lost lines={lost}\n" if lost else "")
        os.write(self._fd, text.encode("utf-8", "backslashreplace"))

    def flush(self, timeout: float = 1.0) -> None:
        """Waits until all lines are written, at most `timeout` seconds. Only when the process ends."""
        self._summarise()
        self._outbox.flush(timeout)


def standard_error() -> int:
    """Returns the descriptor of standard error; /dev/null if the process was started without one, because another file
    may use descriptor 2 now."""
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if sys.stderr is None else sys.stderr.fileno()
