"""One readiness loop with callbacks that drain: never a task per message, never a wait for work to finish."""

from __future__ import annotations

import math
import select
from collections.abc import Callable
from typing import Protocol

Ready = tuple[int, Callable[[], None]]


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Loop:
    """Level-triggered epoll: the only kind that /dev/ecryptfs serves properly."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._muted: dict[int, float] = {}

    def add(self, source: HasFileno, callback: Callable[[], None]) -> None:
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def remove(self, source: HasFileno) -> None:
        """Before the source is closed; once or more often."""
        fd = source.fileno()
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        self._muted.pop(fd, None)

    def mute(self, source: HasFileno, until: float) -> None:
        """Lets a noisy source wait: its buffer fills, and its sender is the one that pays."""
        fd = source.fileno()
        if fd in self._callbacks:
            self._epoll.modify(fd, 0)
            self._muted[fd] = until

    def next_wake(self) -> float:
        """When `unmute` must be called at the latest; inf while nobody is muted."""
        return min(self._muted.values()) if self._muted else math.inf

    def unmute(self, now: float) -> None:
        for fd in [fd for fd, until in self._muted.items() if until <= now]:
            del self._muted[fd]
            self._epoll.modify(fd, select.EPOLLIN)

    def wait(self, timeout: float) -> list[Ready]:
        """Waits at most `timeout` seconds (negative: for ever); gives what is ready, for `run`."""
        return [(fd, self._callbacks[fd]) for fd, _ in self._epoll.poll(timeout) if fd in self._callbacks]

    def run(self, ready: list[Ready]) -> None:
        """Calls back, but for those that one before has removed: their descriptor may be another's by now."""
        for fd, callback in ready:
            if self._callbacks.get(fd) is callback:
                callback()

    def close(self) -> None:
        self._epoll.close()
