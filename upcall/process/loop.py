"""Calls back sources that are ready, fairly between owners, and timers. One thread; callbacks must not block.

Fair between owners (persons): when more sources are ready than a turn takes, the owners that used least time recently
come first. So an owner's waiting time does not grow with the number of others that are always ready.
"""

from __future__ import annotations

import heapq
import itertools
import math
import select
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

URGENT = -1  # the owner of what is served in every turn: the kernel, signals, ends of processes
LISTENER = -2  # the owner of listening sockets, which belong to no person
IDLE = -3  # `Loop.running` outside of owners' callbacks: in timers and at shutdown
PER_TURN = 4  # callbacks, urgent ones not counted; another epoll_wait costs less than one of them
# A peer can make a send to it, or a close, slow: 50,000 epoll watches on its socket cost 12 ms. An owner with a slow
# callback is watched; from the fourth slow one in a row on (by processor time, so that preemption does not count) each
# pauses it for a multiple. In a virtual machine the host's preemption may count as processor time: it can last for
# seconds, but it hits callbacks at random. Root is never paused. A turn ends after _TURN; sources left out are
# reported again in the next. The times are for a processor that counts to ten thousand in _COUNTED, and longer on a
# slower one (emulated: 20 times).
_SLOW, _PAUSE, _TURN = 0.00025, 20, 0.0005  # seconds of a callback; its multiple; seconds of a turn
_IN_A_ROW, _LONGEST = 3, 1.0  # slow callbacks, the unmeasured first one not counted; seconds of a pause
_COUNTED = 0.0003  # seconds
_CHARGED = 0.002  # seconds of work in another owner's callback until the owner is paused
_WATCHED = 1024  # owners watched; above this only paused ones are kept
_HALVED_EVERY = 0.05  # seconds until an owner's used time counts half


T = TypeVar("T")
P = ParamSpec("P")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Pollable:
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
        self._sources: dict[int, Pollable] = {}
        self._muted: dict[int, float] = {}
        self._used: dict[int, float] = {}  # by owner: seconds of recent callbacks
        self._deferred: dict[int, deque[Callable[[], None]]] = {}  # by owner
        pace = _pace()
        self._slow, self._turn, self._much = _SLOW * pace, _TURN * pace, _CHARGED * pace
        self.running = IDLE  # the owner whose callback is running
        self.over = False  # shutdown: `defer` calls back at once
        self._paused: dict[int, float] = {}  # by owner: paused until, after a slow callback
        self._charged: dict[int, float] = {}  # the same, after work in another owner's callback
        self._suspected: set[int] = set()  # owners whose work in others' callbacks was slow by the clock
        # Owners whose last callback was slow: their processor time is read. How many more were slow in a row.
        self._watched: dict[int, int] = {}
        self._halved = 0.0
        self._timers: list[tuple[float, int, Timer]] = []  # a heap
        self._numbers = itertools.count()
        self._unmuting = Timer(self, self._unmute)
        self.wake = math.inf  # when `fire` must be called at the latest
        # Seconds of CLOCK_MONOTONIC, read once per turn. Data read in this turn arrived after `since`, the time of the
        # previous turn.
        self.now = self.since = time.monotonic()

    def timer(self, callback: Callable[[float], None]) -> Timer:
        """Returns a timer, not yet scheduled. `callback(now)`: seconds of CLOCK_MONOTONIC."""
        return Timer(self, callback)

    def due(self, when: float, timer: Timer) -> None:
        """Schedules a timer; called by Timer.at."""
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        self.wake = self._timers[0][0]

    def fire(self, now: float) -> None:
        """Calls the timers that are due."""
        if now < self.wake:
            return
        while self._timers and self._timers[0][0] <= now:
            when, _, timer = heapq.heappop(self._timers)
            if timer.when == when:  # otherwise it was called at an earlier time
                timer.when = math.inf
                timer.callback(now)
        self.wake = self._timers[0][0] if self._timers else math.inf

    def add(self, source: HasFileno, callback: Callable[[], None], owner: int) -> None:
        """Calls `callback()` whenever the source is readable, until `remove`. `owner`: a person's uid, or URGENT,
        LISTENER. OSError."""
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._sources[fd] = Pollable(fd, callback, owner)

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

    def wait_until(self, when: float) -> list[Pollable]:
        """Waits until a source is ready, a timer is due, or `when` (seconds of CLOCK_MONOTONIC). Returns the ready
        sources, for `run`, and sets `now` and `since`."""
        wake = when if when < self.wake else self.wake
        timeout = -1.0
        if wake != math.inf and (timeout := wake - time.monotonic()) < 0.0:
            timeout = 0.0
        ready = self.wait(timeout)
        self.since, self.now = self.now, time.monotonic()
        return ready

    def turn(self, until: float = math.inf) -> None:
        """Waits as `wait_until`, then calls back ready sources and due timers."""
        ready = self.wait_until(until)
        self.run(ready, self.now)
        self.fire(self.now)

    def wait(self, timeout: float) -> list[Pollable]:
        """Waits at most `timeout` seconds (negative: without limit). Returns the ready sources, for `run`."""
        if self._deferred:
            due = max(0.0, min(self._paused.get(owner, 0.0) for owner in self._deferred) - time.monotonic())
            timeout = due if timeout < 0 else min(timeout, due)
        sources = self._sources
        return [sources[fd] for fd, _ in self._epoll.poll(timeout) if fd in sources]

    def defer(self, owner: int, callback: Callable[[], None]) -> None:
        """Calls back soon, charged to `owner`: for work that another owner's callback, a timer or the end of a process
        causes, and that the owner can make slow."""
        if self.over:
            callback()
        else:
            self._deferred.setdefault(owner, deque()).append(callback)

    def run(self, ready: list[Pollable], now: float) -> None:
        """Calls back some of the ready sources, but none that an earlier callback has removed: its descriptor may have
        been reused. `now`: time.monotonic(), just read."""
        if now - self._halved >= _HALVED_EVERY:
            self._halve(now)
        if self._deferred:
            ready = [*ready, *(Pollable(-1, partial(self._run_deferred, owner), owner) for owner in self._deferred)]
        used, sources, watched, clock = self._used, self._sources, self._watched, time.monotonic
        if len(ready) > 1:
            urgent = [source for source in ready if source.owner == URGENT]
            others = [source for source in ready if source.owner != URGENT]
            others.sort(key=lambda source: used.get(source.owner, 0.0))
            del others[PER_TURN:]
            ready = urgent + others
        began = now
        for source in ready:
            if sources.get(source.fd) is not source and source.fd >= 0:
                continue
            owner = self.running = source.owner
            if owner in watched:
                self._run_watched(source, now)
                ended = clock()
            else:
                source.callback()
                ended = clock()
                if ended - began > self._slow and owner > 0:
                    watched[owner] = 0
            used[owner] = used.get(owner, 0.0) + ended - began
            began = ended
            if ended - now > self._turn and owner != URGENT:
                break
        self.running = IDLE

    def _run_deferred(self, owner: int) -> None:
        queue = self._deferred[owner]
        callback = queue.popleft()
        if not queue:
            del self._deferred[owner]
        callback()

    def _run_watched(self, source: Pollable, now: float) -> None:
        owner = source.owner
        if self._paused.get(owner, 0.0) > now:
            if source.fd >= 0:
                self.mute(source, self._paused[owner])
            return
        began = time.thread_time()
        source.callback()
        used = time.thread_time() - began
        if used > self._slow:
            self._watched[owner] += 1
            if self._watched[owner] >= _IN_A_ROW:
                self._paused[owner] = now + min(used * _PAUSE, _LONGEST)
        elif owner not in self._paused:
            del self._watched[owner]

    def pays(self, owner: int) -> bool:
        """Returns whether work for the owner delays only the owner: its own callback is running, or it is root."""
        return owner in (self.running, 0)

    def measured(self, owner: int, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Does work for an owner in another owner's callback, and charges its processor time to the owner. Returns
        what `work` returns, raises what it raises.

        Reading the processor time is a system call, which few owners deserve: it begins with the owner's first work
        that was slow by the clock, which is not charged because preemption may have been the cause."""
        if owner in self._suspected:
            began = time.thread_time()
            try:
                return work(*args, **named)
            finally:
                self.charge(owner, time.thread_time() - began)
        began = time.monotonic()
        try:
            return work(*args, **named)
        finally:
            if time.monotonic() - began > self._much:
                self._suspected.add(owner)

    def charge(self, owner: int, seconds: float) -> None:
        """Charges processor time of work for an owner in another owner's callback; more than _CHARGED pauses the
        owner."""
        if seconds > self._much and owner > 0:
            self._watched[owner] = _IN_A_ROW
            self._paused[owner] = self._charged[owner] = self.now + min(seconds * _PAUSE, _LONGEST)

    def charged(self, owner: int) -> bool:
        """Returns whether the owner is paused because of work in others' callbacks; further work should be skipped."""
        return bool(self._charged) and self._charged.get(owner, 0.0) > self.now

    def _halve(self, now: float) -> None:
        self._halved = now
        self._paused = {owner: until for owner, until in self._paused.items() if until > now}
        self._charged = {owner: until for owner, until in self._charged.items() if until > now}
        if len(self._watched) > _WATCHED:
            self._watched = {owner: slow for owner, slow in self._watched.items() if owner in self._paused}
        if len(self._suspected) > _WATCHED:
            self._suspected.intersection_update(self._charged)
        self._used = {owner: used / 2 for owner, used in self._used.items() if used > 1e-5}

    def close(self) -> None:
        """Closes the epoll descriptor. The sources must be removed and closed by their owners."""
        self._epoll.close()


def _pace() -> float:
    """Returns how much slower this processor is than the one that the times are for, at least 1."""
    best = math.inf
    for _ in range(3):  # the first is often slowed by other start-up work
        began = time.thread_time()
        sum(range(10_000))
        best = min(best, time.thread_time() - began)
    return max(1.0, best / _COUNTED)
