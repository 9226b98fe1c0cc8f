"""A log that never blocks: one line per event, handed to a thread; what does not fit is counted, not waited for.

The standard library's QueueHandler formats in the caller, and its queue either grows without bound or blocks.
"""

from __future__ import annotations

import os
import sys
import time

from upcall.outbox import Outbox
from upcall.wire.logfmt import shown

_PER_SECOND = 20  # lines of one event; the rest is counted


class EventLog:
    """`log("event", key=value, ...)` writes `name[pid]: event key=value` to a descriptor, soon."""

    def __init__(self, name: str, fd: int | None = None) -> None:
        self._prefix = f"{name}[{os.getpid()}]: "
        self._fd = standard_error() if fd is None else fd
        self._windows: dict[str, list[float]] = {}  # event -> [start of the second, lines in it]
        self._outbox: Outbox[str] = Outbox(self._write)

    def __call__(self, event: str, /, **fields: object) -> None:
        now = time.monotonic()
        window = self._windows.setdefault(event, [now, 0])
        if now - window[0] >= 1:
            if window[1] > _PER_SECOND:
                self._outbox.put(f"{event} suppressed={int(window[1]) - _PER_SECOND}")
            window[:] = [now, 0]
        window[1] += 1
        if window[1] <= _PER_SECOND:
            self._outbox.put(" ".join([event, *(f"{key}={shown(value)}" for key, value in fields.items())]))

    def _write(self, line: str, lost: int) -> None:
        text = f"{self._prefix}{line}\n" + (f"{self._prefix}lost lines={lost}\n" if lost else "")
        os.write(self._fd, text.encode("utf-8", "backslashreplace"))

    def flush(self, timeout: float = 1.0) -> None:
        """Waits until what was logged is written, at most `timeout` seconds. For the very end only."""
        self._outbox.flush(timeout)


def standard_error() -> int:
    """Nothing is written if we were started without one: descriptor 2 may be a socket of ours by now."""
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if sys.stderr is None else sys.stderr.fileno()
