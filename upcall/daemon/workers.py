"""The workers: a bounded pool of blocking threads on one socket, and lanes that keep slow keys to themselves."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from upcall.errors import Refused

Job = TypeVar("Job")

WAITING = 2  # workers kept at the socket when idle
PER_LANE = max(2, min(8, os.cpu_count() or 2))
AT_MOST = 32
WAITING_IN_LANE = 64


class _Lane(Generic[Job]):
    __slots__ = ("deadlines", "waiting")

    def __init__(self) -> None:
        self.deadlines: list[float] = []  # of what runs
        self.waiting: deque[tuple[Job, float]] = deque()


class Workers(Generic[Job]):
    """`receive()` blocks for the next job: (job, lane, deadline) or None. `work(job)` answers it.

    `refuse(job, reason)` answers a job that no worker will see.
    """

    def __init__(
        self,
        receive: Callable[[], tuple[Job, str, float] | None],
        work: Callable[[Job], None],
        refuse: Callable[[Job, Refused], None],
        per_lane: int = PER_LANE,
        at_most: int = AT_MOST,
    ) -> None:
        self._receive, self._work, self._refuse = receive, work, refuse
        self._per_lane, self._at_most = per_lane, at_most
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane[Job]] = {}
        self._receiving = 0
        self.threads = 0

    def start(self) -> None:
        with self._lock:
            for _ in range(WAITING):
                self._add()

    def _add(self) -> None:
        """One more thread at the socket; the lock is held."""
        self.threads += 1
        self._receiving += 1
        threading.Thread(target=self._run, name=f"worker-{self.threads}", daemon=True).start()

    def _run(self) -> None:
        while True:
            got = self._receive()
            if got is None:
                continue
            job, name, deadline = got
            lane = self._enter(job, name, deadline)
            while lane is not None:
                self._work(job)
                following = self._leave(lane, name, deadline)
                if following is None:
                    break
                job, deadline = following

    def _enter(self, job: Job, name: str, deadline: float) -> _Lane[Job] | None:
        """A place in the lane; None if the job waits there, or was refused."""
        with self._lock:
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = _Lane()
            if len(lane.deadlines) < self._per_lane:
                lane.deadlines.append(deadline)
                self._receiving -= 1
                if not self._receiving and self.threads < self._at_most:
                    self._add()
                return lane
            now = time.monotonic()
            while lane.waiting and lane.waiting[0][1] <= now:
                lane.waiting.popleft()  # the broker has answered
            if now < max(lane.deadlines) and len(lane.waiting) < WAITING_IN_LANE:
                lane.waiting.append((job, deadline))
                return None
        self._refuse(job, Refused("busy"))  # all that runs here is overdue: it hangs; or too many wait already
        return None

    def _leave(self, lane: _Lane[Job], name: str, deadline: float) -> tuple[Job, float] | None:
        """The lane's next job in time, or None: back to the socket."""
        with self._lock:
            lane.deadlines.remove(deadline)
            now = time.monotonic()
            while lane.waiting:
                job, deadline = lane.waiting.popleft()
                if deadline > now:  # otherwise the broker has answered already
                    lane.deadlines.append(deadline)
                    return job, deadline
            if not lane.deadlines:
                del self._lanes[name]
            self._receiving += 1
            return None

    @property
    def running(self) -> int:
        """Jobs that are being worked on or wait in a lane."""
        with self._lock:
            return sum(len(lane.deadlines) + len(lane.waiting) for lane in self._lanes.values())
