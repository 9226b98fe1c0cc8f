"""Runs jobs in a bounded pool of threads: a leader at the socket, parked followers, lanes that isolate slow keys.

The leader receives a job and runs it itself. Cheap jobs are run one after another by the same thread, since waking
another one costs more than they do. Before a job that is worth it, the leader promotes a parked follower, which goes
to the socket in its place:

- A job of a kind that usually takes longer than QUICK, or is not known, never leaves the socket unattended.
- A quicker job is worth it if a follower comes to the socket before a quarter of it is over, and a processor is free.
  Both times are learned by each lane and kind of job. A job that does not release the interpreter's lock is never
  worth it: no follower gets past it.

A job that takes unusually long is found by the watcher, which promotes a follower within two of its rounds.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from upcall.core.errors import Refused

Job = TypeVar("Job")

PER_LANE = max(2, min(8, os.cpu_count() or 2))
WAITING = PER_LANE  # threads at the start; at the socket while quick jobs are worth it; and parked, at most
AT_MOST = 32
WAITING_IN_LANE = 4096  # jobs, at most: the number of a broker's contexts
QUICK = 1e-3  # seconds; longer jobs never leave the socket unattended
OVERLONG = 0.02  # seconds; the watcher's rounds
_LANES = 256  # that are remembered with what is known of their jobs
_KINDS = 8  # of a lane, likewise
_SOON = 4  # a follower helps if it comes within a 4th of a job: the interpreter's lock changes hands several times
_TRIED = 1024  # jobs, after which a follower is promoted again although that did not help


class _Pace:
    """What is known of one kind of jobs in a lane. Times in seconds."""

    __slots__ = ("arrival", "helped", "jobs", "least", "quick", "shared", "too_short", "usual")

    def __init__(self) -> None:
        self.jobs = 0
        self.usual = OVERLONG  # smoothed; until the first job is done, it is assumed to be slow
        self.least = math.inf  # near the minimum, which contains next to no waiting for other threads
        self.arrival = 0.0  # likewise: from a job's begin until a promoted follower is at the socket; 0: unknown
        self.quick = False  # it usually takes QUICK at most
        self.helped = False  # a follower is at the socket before a quarter of a job is over
        self.shared = True  # a follower is promoted before the next job, if there is something to do for it
        self.too_short = 0.0  # jobs up to this change nothing of it

    def took(self, seconds: float) -> None:
        self.jobs += 1
        if seconds < self.too_short and self.jobs % _TRIED:
            return
        if self.jobs == 1:
            self.usual = seconds
        else:
            self.usual += (seconds - self.usual) / 4
        least = self.least
        self.least = least = seconds if seconds < least else least + (seconds - least) / 8
        self.quick = self.usual <= QUICK
        self.helped = 0 < _SOON * self.arrival < least
        self.shared = self.helped or not self.quick or not self.arrival or not self.jobs % _TRIED
        self.too_short = 0.0 if self.shared else min(_SOON * self.arrival, QUICK)

    def arrived(self, seconds: float) -> None:
        known = self.arrival
        # Grows slowly: one follower that was held up by something else does not count.
        self.arrival = seconds if seconds < known or not known else known + min(seconds - known, known) / 8

    def is_slow(self) -> None:
        self.usual, self.quick, self.shared, self.too_short = OVERLONG, False, True, 0.0


class _Lane(Generic[Job]):
    __slots__ = ("deadlines", "paces", "quick", "waiting")

    def __init__(self) -> None:
        self.deadlines: list[float] = []  # of running jobs
        self.waiting: deque[tuple[Job, Hashable, float]] = deque()
        self.paces: dict[Hashable, _Pace] = {}
        self.quick = False  # what runs is expected to take QUICK at most

    def new_pace(self, kind: Hashable) -> _Pace:
        if len(self.paces) >= _KINDS:
            self.paces.clear()
        pace = self.paces[kind] = _Pace()
        return pace


class _Seat:
    """Where a worker parks. `promoted_at`, `pace`: the begin of the job that it was promoted for, and its kind's."""

    __slots__ = ("gate", "pace", "promoted_at")

    def __init__(self) -> None:
        self.gate = threading.Lock()
        self.gate.acquire()
        self.pace: _Pace | None = None
        self.promoted_at = 0.0


_SOCKET, _PARKED, _ENDED = range(3)  # where a worker goes after its jobs


class Workers(Generic[Job]):
    """A bounded pool of worker threads.

    `receive()` blocks until the next job and returns (job, lane, kind, deadline, now) or None. Jobs of one lane and
    kind take about equally long; `deadline` and `now` are seconds of CLOCK_MONOTONIC. `work(job)` answers it; at most
    PER_LANE jobs of a lane run at a time. `refuse(job, reason)` answers a job that is not worked on. All are called in
    workers.
    """

    def __init__(
        self,
        receive: Callable[[], tuple[Job, str, Hashable, float, float] | None],
        work: Callable[[Job], None],
        refuse: Callable[[Job, Refused], None],
        per_lane: int = PER_LANE,
        at_most: int = AT_MOST,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`look()` is called every 20 ms while jobs run, in a thread of its own; it must not block."""
        self._receive, self._work, self._refuse, self._look = receive, work, refuse, look
        self._per_lane, self._at_most = per_lane, at_most
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane[Job]] = {}
        self._parked: list[_Seat] = []
        self._receiving = 0
        self._taken = 0  # jobs so far
        self._watching = False
        self._begun = threading.Semaphore(0)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.threads = 0

    def start(self) -> None:
        with self._lock:
            self._add()
            for _ in range(WAITING - 1):
                self._add(_PARKED)
        self._watcher.start()

    # --- with the lock held --------------------------------------------------------------------------------

    def _add(self, where: int = _SOCKET) -> None:
        """Starts a worker unless there are AT_MOST."""
        if self.threads < self._at_most:
            seat = _Seat()
            with contextlib.suppress(RuntimeError):  # the process limit is reached
                threading.Thread(
                    target=self._run, args=(seat, where), name=f"worker-{self.threads + 1}", daemon=True
                ).start()
                self.threads += 1
                self._goes(seat, where)

    def _goes(self, seat: _Seat, where: int) -> None:
        if where == _SOCKET:
            self._receiving += 1
        elif where == _PARKED:
            self._parked.append(seat)
        else:
            self.threads -= 1

    def _promote(self, pace: _Pace | None = None, now: float = 0.0) -> None:
        """Sends another worker to the socket: a parked one, or else a new one."""
        if not self._parked:
            return self._add()
        seat = self._parked.pop()
        seat.pace, seat.promoted_at = pace, now
        self._receiving += 1
        return seat.gate.release()

    def _new_lane(self, name: str) -> _Lane[Job]:
        if len(self._lanes) >= _LANES:
            self._lanes = {name: lane for name, lane in self._lanes.items() if lane.deadlines}
        lane = self._lanes[name] = _Lane()
        return lane

    def _share(self, pace: _Pace, now: float) -> None:
        """Promotes a follower before the leader runs a job, if there is something to do for it."""
        if self._receiving:
            return
        if not pace.quick or sum(len(lane.deadlines) for lane in self._lanes.values() if lane.quick) < WAITING:
            self._promote(pace, now)

    # --- the workers ---------------------------------------------------------------------------------------

    def _run(self, seat: _Seat, where: int) -> None:
        while where != _ENDED:
            if where == _PARKED:
                self._park(seat)
            where = self._lead(seat)

    def _park(self, seat: _Seat) -> None:
        """Waits until this worker is promoted."""
        seat.gate.acquire()
        if seat.pace is not None:
            pace, seat.pace = seat.pace, None
            with self._lock:
                pace.arrived(time.monotonic() - seat.promoted_at)

    def _lead(self, seat: _Seat) -> int:
        """Receives a job and runs it, then those that wait in its lane. Returns where this worker goes."""
        got = self._receive()
        if got is None:
            return _SOCKET
        job, name, kind, deadline, begun = got
        entered = self._enter(job, name, kind, deadline, begun)
        if entered is None:
            return _SOCKET
        lane, pace = entered
        while True:
            self._work(job)
            ended = time.monotonic()
            following = self._leave(seat, lane, pace, deadline, ended, ended - begun)
            if isinstance(following, int):
                return following
            begun, (job, kind, deadline) = ended, following
            pace = lane.paces.get(kind) or lane.new_pace(kind)

    def _enter(
        self, job: Job, name: str, kind: Hashable, deadline: float, now: float
    ) -> tuple[_Lane[Job], _Pace] | None:
        """Returns lane and pace if the job may run now; None if it waits in the lane, or was refused."""
        with self._lock:
            self._taken += 1
            lane = self._lanes.get(name) or self._new_lane(name)
            if len(lane.deadlines) < self._per_lane:
                lane.deadlines.append(deadline)
                pace = lane.paces.get(kind) or lane.new_pace(kind)
                lane.quick = pace.quick
                self._receiving -= 1
                if pace.shared:
                    self._share(pace, now)
                if not self._watching:
                    self._watching = True
                    self._begun.release()
                return lane, pace
            while lane.waiting and lane.waiting[0][2] <= now:
                lane.waiting.popleft()  # overdue: the broker has refused it
            if now < max(lane.deadlines) and len(lane.waiting) < WAITING_IN_LANE:
                lane.waiting.append((job, kind, deadline))
                return None
        self._refuse(job, Refused("busy"))  # all jobs of the lane are overdue, so its key hangs; or the queue is full
        return None

    def _leave(
        self, seat: _Seat, lane: _Lane[Job], pace: _Pace, deadline: float, now: float, took: float
    ) -> tuple[Job, Hashable, float] | int:
        """Returns the lane's next job that is not overdue; without one, where this worker goes."""
        with self._lock:
            pace.took(took)
            lane.deadlines.remove(deadline)
            while lane.waiting:
                following = lane.waiting.popleft()
                if following[2] > now:  # otherwise the broker has refused it
                    lane.deadlines.append(following[2])
                    return following
            if self._receiving < (WAITING if pace.helped and pace.quick else 1):
                where = _SOCKET
            elif len(self._parked) < WAITING:
                where = _PARKED
            else:
                where = _ENDED
            self._goes(seat, where)
            return where

    # --- the watcher ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Promotes a follower when a job takes unusually long, and calls `look`. Sleeps while no job runs."""
        while True:
            self._begun.acquire()
            taken = self._taken
            while self._watching:
                time.sleep(OVERLONG)
                with self._lock:
                    quiet = taken == self._taken
                    if quiet and not self._receiving:
                        self._running_are_slow()
                        self._promote()
                    self._watching = not quiet or any(lane.deadlines for lane in self._lanes.values())
                    taken = self._taken
                self._look()

    def _running_are_slow(self) -> None:
        """The next jobs like those that run now do not leave the socket unattended. The caller holds the lock."""
        for lane in self._lanes.values():
            if lane.deadlines:
                lane.quick = False
                for pace in lane.paces.values():
                    pace.is_slow()

    # --- for the main thread -------------------------------------------------------------------------------

    def stuck(self, now: float) -> bool:
        """Returns whether no worker can take the next job: all AT_MOST have an overdue one, or the thread that adds
        workers has ended. `now`: seconds of CLOCK_MONOTONIC."""
        if not self._watcher.is_alive():
            return True
        with self._lock:
            latest = [max(lane.deadlines) for lane in self._lanes.values() if lane.deadlines]
            overdue = all(one < now for one in latest if one != math.inf)  # notices have no deadline
            return not self._receiving and not self._parked and self.threads >= self._at_most and overdue

    @property
    def running(self) -> int:
        """How many jobs run or wait in a lane."""
        with self._lock:
            return sum(len(lane.deadlines) + len(lane.waiting) for lane in self._lanes.values())
