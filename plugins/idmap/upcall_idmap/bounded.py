"""Calls of the name services with a time limit.

A call of libc's can hang for as long as a server is silent, and nobody can interrupt it. So each runs in a thread of
its own, which is left behind when its time is over. While MOST of them are, no other one is begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from upcall.core.errors import Refused

T = TypeVar("T")

MOST: Final = 4  # calls that hang; the next ones are refused at once


class Bounded:
    """Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left_behind = 0

    def call(self, work: Callable[[], T], until: float) -> T:
        """What `work` returns or raises; `until` is on the monotonic clock. Refused if it does not come back."""
        with self._lock:
            if self._left_behind >= MOST:
                raise Refused("name-service-silent", why=f"{self._left_behind} calls of it hang already")
        call = _Call(work)
        threading.Thread(target=self._run, args=(call,), name="upcall-idmap", daemon=True).start()
        if not call.done.wait(max(0.0, until - time.monotonic())):
            with self._lock:
                if not call.done.is_set():
                    call.left_behind = True
                    self._left_behind += 1
                    raise Refused("name-service-silent", why="it does not answer in time")
        return call.outcome()

    def _run(self, call: _Call[T]) -> None:
        call.run()
        with self._lock:
            call.done.set()
            if call.left_behind:
                self._left_behind -= 1


class _Call(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.done = threading.Event()
        self.left_behind = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001 - it is raised where it was called
            self._error = error

    def outcome(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]
