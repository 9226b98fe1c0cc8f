"""A log that never blocks: one line per event, handed to a thread; what does not fit is counted, not waited for.

The standard library's QueueHandler formats in the caller, and its queue either grows without bound or blocks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque

_KEPT = 1000  # lines that may wait for a slow reader
_PER_SECOND = 20  # lines of one event; the rest is counted


class EventLog:
    """`log("event", key=value, ...)` writes `name[pid]: event key=value` to a descriptor, soon."""

    def __init__(self, name: str, fd: int | None = None) -> None:
        self._prefix = f"{name}[{os.getpid()}]: "
        self._fd = _standard_error() if fd is None else fd
        self._lines: deque[str] = deque()
        self._lost = 0
        self._windows: dict[str, list[float]] = {}  # event -> [start of the second, lines in it]
        self._more = threading.Semaphore(0)
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def __call__(self, event: str, /, **fields: object) -> None:
        now = time.monotonic()
        window = self._windows.setdefault(event, [now, 0])
        if now - window[0] >= 1:
            if window[1] > _PER_SECOND:
                self._put(f"{event} suppressed={int(window[1]) - _PER_SECOND}")
            window[:] = [now, 0]
        window[1] += 1
        if window[1] <= _PER_SECOND:
            self._put(" ".join([event, *(f"{key}={_shown(value)}" for key, value in fields.items())]))

    def _put(self, line: str) -> None:
        if len(self._lines) >= _KEPT:
            self._lost += 1
            return
        self._idle.clear()
        self._lines.append(line)
        self._more.release()

    def _write(self) -> None:
        while True:
            self._more.acquire()
            line = self._lines.popleft()
            lost, self._lost = self._lost, 0
            text = f"{self._prefix}{line}\n" + (f"{self._prefix}lost lines={lost}\n" if lost else "")
            try:
                os.write(self._fd, text.encode("utf-8", "backslashreplace"))
            except OSError:
                self._lost += 1
            if not self._lines:
                self._idle.set()

    def flush(self, timeout: float = 1.0) -> None:
        """Waits until what was logged is written, at most `timeout` seconds. For the very end only."""
        self._idle.wait(timeout)


def _standard_error() -> int:
    """Nothing is written if we were started without one: descriptor 2 may be a socket of ours by now."""
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if sys.stderr is None else sys.stderr.fileno()


def _shown(value: object) -> str:
    """A value on one line: quoted when it has blanks or anything unprintable."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text and '"' not in text else ascii(text)
