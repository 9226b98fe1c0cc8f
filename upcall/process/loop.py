"""One readiness loop with callbacks that drain: never a task per message, never a wait for work to finish.

Fair between owners (uids): when more is ready than a turn takes, those who had least of late come first. So what
somebody waits behind does not grow with the number of others who never stop asking.
"""

from __future__ import annotations

import heapq
import itertools
import math
import select
import time
from collections.abc import Callable
from typing import Protocol

URGENT = -1  # an owner who is served in every turn: the kernel, signals, and processes that end
LISTENER = -2  # an owner that is nobody's
PER_TURN = 4  # callbacks, the urgent ones not counted; asking again what is ready costs less than one of them
# A process can make our send to it slow: 50,000 epoll watches on its socket cost 12 ms. Its owner, not root, is not
# served for that time many times over. The clock is read once a turn; after a slow one, its owners are watched: their
# callbacks are measured by processor time, so that being preempted does not count. Reading that clock costs 0.5 us.
_SLOW, _PAUSE = 0.002, 20  # seconds of a turn or a callback; its multiple
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


class Timer:
    """Calls `callback(now)` once, soon after the earliest of the times that it was told (seconds, monotonic)."""

    __slots__ = ("_loop", "callback", "when")

    def __init__(self, loop: Loop, callback: Callable[[float], None]) -> None:
        self._loop, self.callback = loop, callback
        self.when = math.inf

    def at(self, when: float) -> None:
        """A later time than one that it was told already changes nothing: the callback says when it is next due."""
        if when < self.when:
            self.when = when
            self._loop.due(when, self)


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
        self._timers: list[tuple[float, int, Timer]] = []  # a heap
        self._numbers = itertools.count()
        self._unmuting = Timer(self, self._unmute)
        self.wake = math.inf  # when `fire` must be called at the latest
        # Seconds, monotonic. The clock is read once a turn; nothing that is read in this turn can have been there
        # before `since`, the turn before.
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
            if timer.when == when:  # otherwise it has been called at an earlier time already
                timer.when = math.inf
                timer.callback(now)
        self.wake = self._timers[0][0] if self._timers else math.inf

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
            self._unmuting.at(until)

    def _unmute(self, now: float) -> None:
        for fd in [fd for fd, until in self._muted.items() if until <= now]:
            del self._muted[fd]
            self._epoll.modify(fd, select.EPOLLIN)
        if self._muted:
            self._unmuting.at(min(self._muted.values()))

    def wait(self, timeout: float) -> list[Source]:
        """Waits at most `timeout` seconds (negative: for ever); gives what is ready, for `run`."""
        return [self._sources[fd] for fd, _ in self._epoll.poll(timeout) if fd in self._sources]

    def run(self, ready: list[Source], now: float) -> None:
        """Calls back a few of them, but for those that one before has removed: their descriptor may be another's
        by now. `now`: time.monotonic(), just read."""
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
