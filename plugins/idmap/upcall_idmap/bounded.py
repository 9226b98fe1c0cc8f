"""Calls name services with a time-out.

A call of libc blocks while a server is silent, and cannot be interrupted. So each call runs in a thread of its own,
which is left behind after the time-out. While MOST such threads hang, new calls are refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from upcall.core.errors import Refused

T = TypeVar("T")

MOST: Final = 4  # limit of hanging calls; above it, calls are refused at once


class Bounded:
    """Runs calls with a time-out. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left_behind = 0

    def call(self, work: Callable[[], T], until: float) -> T:
        """Returns or raises what `work` does. `until`: seconds of CLOCK_MONOTONIC. Refused after that time, or if MOST
        calls hang."""
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
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            self._error = error

    def outcome(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]
