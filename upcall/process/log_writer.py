"""Things to be written by a thread, so that nobody waits for whoever reads them; what does not fit is counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_KEPT = 1000  # things that may wait for a slow reader


class Outbox(Generic[T]):
    """`write(thing, lost)` writes it, and that so many were lost since the last one; an OSError loses it, too."""

    def __init__(self, write: Callable[[T, int], None]) -> None:
        self._write = write
        self._things: deque[T] = deque()
        self._lost = 0
        self._more = threading.Semaphore(0)
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, thing: T) -> None:
        if len(self._things) >= _KEPT:
            self._lost += 1
            return
        self._idle.clear()
        self._things.append(thing)
        self._more.release()

    def lose(self) -> None:
        """One that is not to be written counts as lost."""
        self._lost += 1

    def _run(self) -> None:
        while True:
            self._more.acquire()
            thing = self._things.popleft()
            lost, self._lost = self._lost, 0
            try:
                self._write(thing, lost)
            except OSError:
                self._lost += lost + 1
            if not self._things:
                self._idle.set()

    def flush(self, timeout: float = 1.0) -> None:
        """Waits until what was put here is written, at most `timeout` seconds. For the very end only."""
        self._idle.wait(timeout)
