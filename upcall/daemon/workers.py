"""Runs jobs in a bounded pool of threads that block on one socket, with lanes that isolate slow keys."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from upcall.core.errors import Refused

Job = TypeVar("Job")

PER_LANE = max(2, min(8, os.cpu_count() or 2))
WAITING = PER_LANE  # idle workers at the socket: each one more adds contention for the interpreter's lock
AT_MOST = 32
WAITING_IN_LANE = 4096  # jobs, at most: the number of a broker's contexts
QUICK = 1e-3  # seconds; a worker that returns this soon needs no replacement at the socket
OVERLONG = 0.02  # seconds without a worker at the socket, at most
_PACES = 256  # lanes whose usual duration is remembered


class _Lane(Generic[Job]):
    __slots__ = ("deadlines", "waiting")

    def __init__(self) -> None:
        self.deadlines: list[float] = []  # of running jobs
        self.waiting: deque[tuple[Job, float]] = deque()


class Workers(Generic[Job]):
    """A bounded pool of worker threads.

    `receive()` blocks until the next job and returns (job, lane, deadline) or None; deadline: seconds of
    CLOCK_MONOTONIC. `work(job)` answers it; at most PER_LANE jobs of a lane run at a time. `refuse(job, reason)`
    answers a job that is not worked on. All are called in workers.
    """

    def __init__(
        self,
        receive: Callable[[], tuple[Job, str, float] | None],
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
        self._paces: dict[str, float] = {}  # seconds that a lane's jobs take, smoothed
        self._receiving = 0
        self._taken = 0  # jobs so far
        self._watching = False
        self._begun = threading.Semaphore(0)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.threads = 0

    def start(self) -> None:
        with self._lock:
            for _ in range(WAITING):
                self._add()
        self._watcher.start()

    def _add(self) -> None:
        """Starts a worker unless there are AT_MOST. The caller holds the lock."""
        if self.threads < self._at_most:
            with contextlib.suppress(RuntimeError):  # the process limit is reached
                threading.Thread(target=self._run, name=f"worker-{self.threads + 1}", daemon=True).start()
                self.threads += 1
                self._receiving += 1

    def _run(self) -> None:
        staying = True
        while staying:
            got = self._receive()
            if got is not None:
                staying = self._serve(*got)
                got = None  # a request and its link are not held while the next is waited for

    def _serve(self, job: Job, name: str, deadline: float) -> bool:
        """Runs a job, then those that wait in its lane. False if this worker is not needed any more."""
        begun = time.perf_counter()
        lane = self._enter(job, name, deadline)
        if lane is None:
            return True
        while True:
            self._work(job)
            ended = time.perf_counter()
            following = self._leave(lane, name, deadline, ended - begun)
            if isinstance(following, bool):
                return following
            begun, (job, deadline) = ended, following

    def _enter(self, job: Job, name: str, deadline: float) -> _Lane[Job] | None:
        """Returns the lane if the job may run now; None if it waits there, or was refused."""
        with self._lock:
            self._taken += 1
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = _Lane()
            if len(lane.deadlines) < self._per_lane:
                lane.deadlines.append(deadline)
                self._receiving -= 1
                if not self._receiving and self._paces.get(name, OVERLONG) > QUICK:
                    self._add()
                if not self._watching:
                    self._watching = True
                    self._begun.release()
                return lane
            now = time.monotonic()
            while lane.waiting and lane.waiting[0][1] <= now:
                lane.waiting.popleft()  # overdue: the broker has refused it
            if now < max(lane.deadlines) and len(lane.waiting) < WAITING_IN_LANE:
                lane.waiting.append((job, deadline))
                return None
        self._refuse(job, Refused("busy"))  # all jobs of the lane are overdue, so its key hangs; or the queue is full
        return None

    def _leave(self, lane: _Lane[Job], name: str, deadline: float, took: float) -> tuple[Job, float] | bool:
        """Returns the lane's next job that is not overdue; otherwise whether the worker returns to the socket."""
        with self._lock:
            self._paces[name] = (3 * self._paces.get(name, took) + took) / 4
            lane.deadlines.remove(deadline)
            now = time.monotonic()
            while lane.waiting:
                job, deadline = lane.waiting.popleft()
                if deadline > now:  # otherwise the broker has refused it
                    lane.deadlines.append(deadline)
                    return job, deadline
            if not lane.deadlines:
                del self._lanes[name]
                if len(self._paces) > _PACES:
                    self._paces.clear()
            if self._receiving >= WAITING:
                self.threads -= 1
                return False
            self._receiving += 1
            return True

    def _watch(self) -> None:
        """Adds a worker at the socket when a job takes unusually long, and calls `look`. Sleeps while no job runs."""
        while True:
            self._begun.acquire()
            taken = -1
            while self._watching:
                time.sleep(OVERLONG)
                with self._lock:
                    self._watching = bool(self._lanes)
                    if not self._receiving and taken == self._taken:
                        self._add()
                    taken = self._taken
                self._look()

    def stuck(self, now: float) -> bool:
        """Returns whether no worker can take the next job: all AT_MOST have an overdue one, or the thread that adds
        workers has ended. `now`: seconds of CLOCK_MONOTONIC."""
        if not self._watcher.is_alive():
            return True
        with self._lock:
            latest = [max(lane.deadlines) for lane in self._lanes.values()]
            overdue = all(one < now for one in latest if one != math.inf)  # notices have no deadline
            return not self._receiving and self.threads >= self._at_most and overdue

    @property
    def running(self) -> int:
        """How many jobs run or wait in a lane."""
        with self._lock:
            return sum(len(lane.deadlines) + len(lane.waiting) for lane in self._lanes.values())
