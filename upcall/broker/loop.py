"""One readiness loop with callbacks that drain: never a task per message, never a wait for work to finish.

Fair between owners (uids): when more is ready than a turn takes, those who had least of late come first. So what
somebody waits behind does not grow with the number of others who never stop asking.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from typing import Protocol

URGENT = -1  # an owner who is served in every turn: the kernel, signals, and processes that end
LISTENER = -2  # an owner that is nobody's
PER_TURN = 4  # callbacks, the urgent ones not counted; asking again what is ready costs less than one of them
# A process can make our send to it slow: 50,000 epoll watches on its socket cost 12 ms. Its owner, not root, is not
# served for that time many times over. A second slow callback in a row counts, by processor time, so that being
# preempted does not; reading that clock costs 0.7 us, so it is read for such owners only.
_SLOW, _PAUSE = 2_000_000, 20  # ns of a callback; its multiple
_WATCHED = 1024  # owners
_HALVED_EVERY = 0.05  # seconds until what somebody had counts half


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Source:
    """Something to wait for, and whose it is."""

    __slots__ = ("callback", "fd", "owner")

    def fileno(self) -> int:
        return self.fd

    def __init__(self, fd: int, callback: Callable[[], None], owner: int) -> None:
        self.fd, self.callback, self.owner = fd, callback, owner


class Loop:
    """Level-triggered epoll: the only kind that /dev/ecryptfs serves properly, and what is left out of a turn
    comes up again in the next."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._muted: dict[int, float] = {}
        self._served: dict[int, int] = {}  # by owner: callbacks of late
        self._paused: dict[int, float] = {}  # by owner: until when, for a callback that was slow
        self._watched: set[int] = set()  # owners whose last callback was slow: their processor time is read
        self._halved = 0.0

    def add(self, source: HasFileno, callback: Callable[[], None], owner: int) -> None:
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._sources[fd] = Source(fd, callback, owner)

    def remove(self, source: HasFileno) -> None:
        """Before the source is closed; once or more often."""
        fd = source.fileno()
        if self._sources.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        self._muted.pop(fd, None)

    def mute(self, source: HasFileno, until: float) -> None:
        """Lets a noisy source wait: its buffer fills, and its sender is the one that pays."""
        fd = source.fileno()
        if fd in self._sources:
            self._epoll.modify(fd, 0)
            self._muted[fd] = until

    def next_wake(self) -> float:
        """When `unmute` must be called at the latest; inf while nobody is muted."""
        return min(self._muted.values()) if self._muted else math.inf

    def unmute(self, now: float) -> None:
        for fd in [fd for fd, until in self._muted.items() if until <= now]:
            del self._muted[fd]
            self._epoll.modify(fd, select.EPOLLIN)

    def wait(self, timeout: float) -> list[Source]:
        """Waits at most `timeout` seconds (negative: for ever); gives what is ready, for `run`."""
        return [self._sources[fd] for fd, _ in self._epoll.poll(timeout) if fd in self._sources]

    def run(self, ready: list[Source], now: float) -> None:
        """Calls back a few of them, but for those that one before has removed: their descriptor may be another's
        by now."""
        if now - self._halved >= _HALVED_EVERY:
            self._halve(now)
        served = self._served
        if len(ready) > PER_TURN:
            urgent = [source for source in ready if source.owner == URGENT]
            others = [source for source in ready if source.owner != URGENT]
            others.sort(key=lambda source: served.get(source.owner, 0))
            ready = urgent + others[:PER_TURN]
        began = time.perf_counter_ns()
        for source in ready:
            if self._sources.get(source.fd) is not source:
                continue
            owner = source.owner
            if self._paused and self._paused.get(owner, 0.0) > now:
                self.mute(source, self._paused[owner])
                continue
            served[owner] = served.get(owner, 0) + 1
            used = time.thread_time_ns() if owner in self._watched else 0
            source.callback()
            ended = time.perf_counter_ns()
            if used:
                self._charge(owner, time.thread_time_ns() - used, now)
            elif ended - began > _SLOW and owner > 0:
                self._watched.add(owner)
            began = ended

    def _charge(self, owner: int, used: int, now: float) -> None:
        """A callback of an owner that is watched took `used` ns of processor time."""
        if used > _SLOW:
            self._paused[owner] = now + used * _PAUSE / 1e9
        else:
            self._watched.discard(owner)

    def _halve(self, now: float) -> None:
        self._halved = now
        self._paused = {owner: until for owner, until in self._paused.items() if until > now}
        if len(self._watched) > _WATCHED:
            self._watched.clear()
        self._served = {owner: count >> 1 for owner, count in self._served.items() if count > 1}

    def close(self) -> None:
        self._epoll.close()
