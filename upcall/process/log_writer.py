"""Writes items in a thread, so that a slow reader does not block the caller; items that do not fit are counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_KEPT = 1000  # items in the queue, at most


class Outbox(Generic[T]):
    """A bounded queue with a writer thread. Thread-safe.

    `write(item, lost)`: writes an item, and how many were lost since the previous one. Runs in the writer thread and
    may block; an item whose write raises OSError counts as lost.
    """

    def __init__(self, write: Callable[[T, int], None]) -> None:
        self._write = write
        self._things: deque[T] = deque()
        self._lost = 0
        self._more = threading.Semaphore(0)
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, thing: T) -> None:
        """Queues an item. Does not block; counts it as lost if the queue is full."""
        if len(self._things) >= _KEPT:
            self._lost += 1
            return
        self._idle.clear()
        self._things.append(thing)
        self._more.release()

    def lose(self) -> None:
        """Counts one item as lost."""
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
        """Waits until the queue is written, at most `timeout` seconds. Only when the process ends."""
        self._idle.wait(timeout)
