"""Calls back sources that are ready, fairly between owners, and timers. One thread; callbacks must not block.

Fair queueing: if more sources are ready than a turn takes, owners (uids) with the fewest recent callbacks come first.
So one owner's delay does not grow with the load that others cause.
"""

from __future__ import annotations

import heapq
import itertools
import math
import select
import time
from collections.abc import Callable
from typing import Protocol

URGENT = -1  # an owner that is served in every turn: the kernel, signals, and the ends of processes
LISTENER = -2  # the owner of listening sockets
PER_TURN = 4  # callbacks, not counting urgent ones; epoll_wait(2) costs less than one of them
# A process can make a send to it slow: 50,000 epoll watches on its socket cost 12 ms. Then its owner, unless root, is
# paused for a multiple of that time. The clock is read once per turn; after a slow turn, its owners are watched: their
# callbacks are measured in processor time, so that preemption does not count. Reading that clock costs 0.5 us.
_SLOW, _PAUSE = 0.002, 20  # seconds of a turn or callback that is slow; multiple of its duration
_WATCHED = 1024  # owners, at most
_HALVED_EVERY = 0.05  # seconds after which past callbacks of an owner count half


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Source:
    """A descriptor to wait for, its callback and its owner."""

    __slots__ = ("callback", "fd", "owner")

    def fileno(self) -> int:
        return self.fd

    def __init__(self, fd: int, callback: Callable[[], None], owner: int) -> None:
        self.fd, self.callback, self.owner = fd, callback, owner


class Timer:
    """Calls `callback(now)` once, soon after the earliest time passed to `at` (seconds of CLOCK_MONOTONIC)."""

    __slots__ = ("_loop", "callback", "when")

    def __init__(self, loop: Loop, callback: Callable[[float], None]) -> None:
        self._loop, self.callback = loop, callback
        self.when = math.inf

    def at(self, when: float) -> None:
        """Schedules the callback. A time later than the scheduled one is ignored: the callback must reschedule."""
        if when < self.when:
            self.when = when
            self._loop.due(when, self)


class Loop:
    """Waits with level-triggered epoll, the only kind that works with /dev/ecryptfs. Sources that a turn leaves out
    are reported again in the next. Not thread-safe: all methods run in the loop's thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._muted: dict[int, float] = {}
        self._served: dict[int, int] = {}  # by owner: recent callbacks
        self._paused: dict[int, float] = {}  # by owner: until when, for a callback that was slow
        self._watched: set[int] = set()  # owners whose last callback was slow: their processor time is read
        self._halved = 0.0
        self._timers: list[tuple[float, int, Timer]] = []  # a heap
        self._numbers = itertools.count()
        self._unmuting = Timer(self, self._unmute)
        self.wake = math.inf  # when `fire` must be called at the latest
        # Seconds of CLOCK_MONOTONIC, read once per turn. What is read in this turn arrived after `since`, the time
        # of the turn before.
        self.now = self.since = time.monotonic()

    def timer(self, callback: Callable[[float], None]) -> Timer:
        return Timer(self, callback)

    def due(self, when: float, timer: Timer) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        self.wake = self._timers[0][0]

    def fire(self, now: float) -> None:
        """Calls the timers that are due."""
        while self._timers and self._timers[0][0] <= now:
            when, _, timer = heapq.heappop(self._timers)
            if timer.when == when:  # otherwise it was called at an earlier time
                timer.when = math.inf
                timer.callback(now)
        self.wake = self._timers[0][0] if self._timers else math.inf

    def add(self, source: HasFileno, callback: Callable[[], None], owner: int) -> None:
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._sources[fd] = Source(fd, callback, owner)

    def remove(self, source: HasFileno) -> None:
        """Stops waiting for a source. Call it before closing the source; may be repeated."""
        fd = source.fileno()
        if self._sources.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        self._muted.pop(fd, None)

    def mute(self, source: HasFileno, until: float) -> None:
        """Rate-limits a source: does not read it until a time, so that its buffer fills and its sender blocks."""
        fd = source.fileno()
        if fd in self._sources:
            self._epoll.modify(fd, 0)
            self._muted[fd] = until
            self._unmuting.at(until)

    def _unmute(self, now: float) -> None:
        for fd in [fd for fd, until in self._muted.items() if until <= now]:
            del self._muted[fd]
            self._epoll.modify(fd, select.EPOLLIN)
        if self._muted:
            self._unmuting.at(min(self._muted.values()))

    def wait(self, timeout: float) -> list[Source]:
        """Waits at most `timeout` seconds (negative: no limit); returns the sources that are ready, for `run`."""
        return [self._sources[fd] for fd, _ in self._epoll.poll(timeout) if fd in self._sources]

    def run(self, ready: list[Source], now: float) -> None:
        """Calls back the urgent sources and at most PER_TURN others, except those that an earlier callback removed:
        their descriptor may have been reused. `now`: the current time.monotonic()."""
        if now - self._halved >= _HALVED_EVERY:
            self._halve(now)
        served = self._served
        if len(ready) > PER_TURN:
            urgent = [source for source in ready if source.owner == URGENT]
            others = [source for source in ready if source.owner != URGENT]
            others.sort(key=lambda source: served.get(source.owner, 0))
            ready = urgent + others[:PER_TURN]
        for source in ready:
            if self._sources.get(source.fd) is not source:
                continue
            owner = source.owner
            served[owner] = served.get(owner, 0) + 1
            if owner in self._watched:
                self._run_watched(source, now)
            else:
                source.callback()
        if time.monotonic() - now > _SLOW:
            self._watched.update(source.owner for source in ready if source.owner > 0)

    def _run_watched(self, source: Source, now: float) -> None:
        owner = source.owner
        if self._paused.get(owner, 0.0) > now:
            self.mute(source, self._paused[owner])
            return
        began = time.thread_time()
        source.callback()
        used = time.thread_time() - began
        if used > _SLOW:
            self._paused[owner] = now + used * _PAUSE
        elif owner not in self._paused:
            self._watched.discard(owner)

    def _halve(self, now: float) -> None:
        self._halved = now
        self._paused = {owner: until for owner, until in self._paused.items() if until > now}
        if len(self._watched) > _WATCHED:
            self._watched.intersection_update(self._paused)
        self._served = {owner: count >> 1 for owner, count in self._served.items() if count > 1}

    def close(self) -> None:
        self._epoll.close()
