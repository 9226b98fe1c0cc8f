"""The pool: a lane that hangs blocks no other lane, however quick it was before; threads start and end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from upcall.core.errors import Refused
from upcall.daemon.workers import AT_MOST, WAITING, Workers
from upcall.testing.processes import until

Job = Callable[[], None]
LONG = 30.0


class Pool:
    """Workers whose socket is a queue, and whose jobs are functions."""

    def __init__(self) -> None:
        self.socket: queue.Queue[tuple[Job, str, float]] = queue.Queue()
        self.refused: list[str] = []
        self.workers: Workers[Job] = Workers(self._receive, lambda job: job(), self._refuse)
        self.workers.start()

    def _receive(self) -> tuple[Job, str, None, float, float]:
        job, lane, deadline = self.socket.get()
        return job, lane, None, deadline, time.monotonic()

    def _refuse(self, _: Job, refused: Refused) -> None:
        self.refused.append(refused.reason)

    def put(self, job: Job, lane: str, patience: float = LONG) -> None:
        self.socket.put((job, lane, time.monotonic() + patience))

    def served(self, lane: str) -> None:
        """One job of the lane, in time."""
        done = threading.Event()
        self.put(done.set, lane)
        assert done.wait(LONG)


def behind(gate: threading.Event) -> Job:
    def job() -> None:
        gate.wait(LONG)

    return job


def test_a_lane_that_starts_to_hang_does_not_block_other_lanes() -> None:
    """All workers are busy in it at that time, and none reads the socket."""
    pool, gate = Pool(), threading.Event()
    for _ in range(50):
        pool.served("quick")
    for _ in range(WAITING):
        pool.put(behind(gate), "quick")
    pool.served("other")
    gate.set()
    until(lambda: pool.workers.running == 0, "all jobs")


def test_lanes_that_hang_leave_a_worker_at_the_socket() -> None:
    pool, gate = Pool(), threading.Event()
    for number in range(8):
        pool.put(behind(gate), f"slow{number}")
    pool.served("other")
    assert WAITING < pool.workers.threads <= AT_MOST
    gate.set()
    until(lambda: pool.workers.running == 0, "all jobs")
    for _ in range(20):
        pool.served("other")
    until(lambda: pool.workers.threads <= WAITING + 1, "threads that are not needed end")


def test_a_full_lane_queues_and_an_overdue_one_refuses() -> None:
    pool, gate, done = Pool(), threading.Event(), threading.Event()
    for _ in range(8):
        pool.put(behind(gate), "full")
    pool.put(done.set, "full")
    until(lambda: pool.workers.running == 9, "nine jobs")
    assert not pool.refused
    gate.set()
    assert done.wait(LONG)
    gate.clear()

    def refused() -> bool:
        pool.put(behind(gate), "late", 0.05)
        return "busy" in pool.refused

    until(refused, "a refusal, once all that runs is overdue")
    gate.set()


def test_without_new_threads_a_worker_keeps_serving_other_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy workers finish their jobs; once threads can be started again, a worker reads the socket again."""
    pool, gate = Pool(), threading.Event()
    tried = threading.Event()

    def fail(_: threading.Thread) -> None:
        tried.set()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for number in range(WAITING):
            pool.put(behind(gate), f"hangs {number}")
        assert tried.wait(LONG)
    pool.served("other")
    assert not pool.workers.stuck(time.monotonic() + 2 * LONG)
    gate.set()
    until(lambda: pool.workers.running == 0, "all jobs")
