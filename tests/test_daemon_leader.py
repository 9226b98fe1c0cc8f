"""The pool's leader and followers, with a clock and watcher's rounds that only the test moves."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from upcall.core.errors import Refused
from upcall.daemon import workers
from upcall.daemon.workers import _TRIED, AT_MOST, OVERLONG, PER_LANE, QUICK, WAITING, Workers, _Pace
from upcall.testing.processes import until

Job = Callable[[], None]
LONG = 30.0
SINCE = 50e-6  # seconds from a job's begin until a promoted follower reads the clock
CHEAP, WORTH_IT, SLOW = 0.0, 250e-6, 0.05  # seconds that jobs take besides


class Pool:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 1000.0
        self.rounds = threading.Semaphore(0)
        self.socket: queue.SimpleQueue[tuple[Job, str]] = queue.SimpleQueue()
        self.at_socket = threading.Semaphore(0)  # released whenever a worker comes to the socket
        self.looked = threading.Semaphore(0)
        played = SimpleNamespace(monotonic=lambda: self.clock, sleep=lambda _: self.rounds.acquire())
        monkeypatch.setattr(workers, "time", played)
        self.workers: Workers[Job] = Workers(self._receive, lambda job: job(), self._refuse, look=self.looked.release)
        self.workers.start()
        self.follower()

    def _receive(self) -> tuple[Job, str, None, float, float]:
        self.at_socket.release()
        job, lane = self.socket.get()
        return job, lane, None, self.clock + LONG, self.clock - SINCE

    def _refuse(self, _: Job, refused: Refused) -> None:
        raise AssertionError(refused)

    def follower(self) -> None:
        """Waits until one more worker has come to the socket."""
        assert self.at_socket.acquire(timeout=LONG)

    def put(self, lane: str, job: Job) -> None:
        self.socket.put((job, lane))

    def run(self, lane: str, job: Job) -> None:
        """Runs a job, and waits until its worker has left it."""
        taken = self.workers._taken
        self.put(lane, job)
        until(lambda: self.workers._taken > taken and not self.workers.running, "a job")

    def taking(self, seconds: float, job: Job = lambda: None) -> Job:
        def timed() -> None:
            job()
            self.clock += seconds

        return timed

    def teach(self, lane: str, seconds: float) -> None:
        """Runs the first job of a lane, during which a follower comes to the socket."""
        self.run(lane, self.taking(seconds, self.follower))

    def end_watch(self) -> None:
        """Waits until the watcher sleeps. Otherwise it would take rounds of the next test."""

        def asleep() -> bool:
            self.rounds.release()
            return not self.workers._watching

        until(asleep, "the end of the watch")

    def round(self, times: int = 1) -> None:
        """Lets the watcher look."""
        for _ in range(times):
            self.rounds.release()
            assert self.looked.acquire(timeout=LONG)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    made = Pool(monkeypatch)
    yield made
    made.end_watch()


def test_cheap_jobs_are_run_by_one_worker_and_no_other_is_woken(pool: Pool) -> None:
    pool.teach("cheap", CHEAP)
    threads = set()
    for _ in range(50):
        pool.run("cheap", pool.taking(CHEAP, lambda: threads.add(threading.get_ident())))
        pool.follower()  # the same one is back
    assert len(threads) == 1
    assert not pool.at_socket.acquire(blocking=False)
    assert pool.workers.threads == WAITING


def test_a_job_for_which_a_second_processor_helps_has_a_follower_at_the_socket_while_it_runs(pool: Pool) -> None:
    pool.teach("expensive", WORTH_IT)
    pool.follower()  # both stay at the socket: no worker has to be woken for the next one
    done, gate = threading.Event(), threading.Event()
    pool.put("expensive", pool.taking(WORTH_IT, lambda: (gate.wait(LONG), None)[1]))
    pool.put("expensive", pool.taking(WORTH_IT, done.set))
    assert done.wait(LONG)
    gate.set()
    assert pool.workers.threads == WAITING, "no thread was started"


def test_after_cheap_jobs_a_parked_follower_is_promoted_before_an_expensive_one(pool: Pool) -> None:
    pool.teach("expensive", WORTH_IT)
    pool.teach("cheap", CHEAP)
    for _ in range(WAITING):
        pool.run("cheap", pool.taking(CHEAP))
    assert len(pool.workers._parked) == WAITING - 1
    while pool.at_socket.acquire(blocking=False):
        pass
    pool.run("expensive", pool.taking(WORTH_IT, pool.follower))
    assert pool.workers.threads == WAITING, "no thread was started"


def test_no_other_worker_is_woken_for_a_job_while_one_is_at_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WAITING", 4)
    pool = Pool(monkeypatch)
    pool.teach("expensive", WORTH_IT)
    for _ in range(10):
        pool.run("expensive", pool.taking(WORTH_IT))
    assert (pool.workers._receiving, len(pool.workers._parked)) == (2, 2)
    pool.end_watch()


def test_a_cheap_job_that_blocks_gives_the_socket_to_a_parked_follower(pool: Pool) -> None:
    pool.teach("cheap", CHEAP)
    gate, entered, done = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        gate.wait(LONG)

    pool.put("cheap", block)
    assert entered.wait(LONG)
    assert not pool.workers._receiving, "nobody is at the socket"
    pool.put("other", done.set)
    pool.round(3)
    assert done.wait(LONG)
    assert pool.workers.threads <= WAITING + 1
    gate.set()
    until(lambda: not pool.workers.running, "all jobs")


def test_a_lane_that_has_blocked_does_not_leave_the_socket_unattended_again(pool: Pool) -> None:
    pool.teach("cheap", CHEAP)
    gate, entered, done = threading.Event(), threading.Semaphore(0), threading.Event()

    def block() -> None:
        entered.release()
        gate.wait(LONG)

    pool.put("cheap", block)
    assert entered.acquire(timeout=LONG)
    pool.round(3)
    pool.put("cheap", block)
    assert entered.acquire(timeout=LONG)
    pool.put("other", done.set)  # without a round of the watcher
    assert done.wait(LONG)
    gate.set()
    until(lambda: not pool.workers.running, "all jobs")


def test_a_lane_that_hangs_does_not_take_the_second_processor_from_others(pool: Pool) -> None:
    pool.teach("expensive", WORTH_IT)
    gate, entered = threading.Event(), threading.Semaphore(0)

    def block() -> None:
        entered.release()
        gate.wait(LONG)

    for _ in range(PER_LANE):
        pool.put("hangs", block)
        assert entered.acquire(timeout=LONG)
    until(lambda: pool.workers._receiving, "a worker at the socket")
    while pool.workers._receiving > 1:  # those that stayed there for the expensive lane
        pool.put(f"hangs {pool.workers._receiving}", block)
        assert entered.acquire(timeout=LONG)
    while pool.at_socket.acquire(blocking=False):
        pass
    came = threading.Event()

    def expensive() -> None:
        until(lambda: pool.workers._receiving, "a follower")
        came.set()

    pool.put("expensive", expensive)
    assert came.wait(LONG)
    gate.set()
    until(lambda: not pool.workers.running, "all jobs")


def test_the_watcher_sleeps_when_no_job_has_come_for_a_round(pool: Pool) -> None:
    pool.run("any", lambda: None)
    assert pool.workers._watching
    pool.end_watch()
    while pool.rounds.acquire(blocking=False):
        pass
    pool.run("any", lambda: None)
    assert pool.workers._watching


def test_many_jobs_of_many_lanes_each_run_once_and_a_lane_has_its_limit(pool: Pool) -> None:
    chance, ran, lock = random.Random(7), Counter[int](), threading.Lock()
    running, most = Counter[str](), Counter[str]()
    stop = threading.Event()

    def job(number: int, lane: str, seconds: float) -> Job:
        def work() -> None:
            with lock:
                ran[number] += 1
                running[lane] += 1
                most[lane] = max(most[lane], running[lane])
            pool.clock += seconds
            with lock:
                running[lane] -= 1

        return work

    def rounds() -> None:
        while not stop.is_set():
            pool.rounds.release()
            pool.looked.acquire(timeout=0.01)

    watching = threading.Thread(target=rounds)
    watching.start()
    for number in range(3000):
        lane = f"lane {chance.randrange(6)}"
        pool.put(lane, job(number, lane, chance.choice((CHEAP, CHEAP, WORTH_IT, SLOW))))
    until(lambda: len(ran) == 3000 and not pool.workers.running, "all jobs")
    stop.set()
    watching.join()
    assert set(ran.values()) == {1}
    assert max(most.values()) <= PER_LANE
    until(lambda: pool.workers._receiving, "a worker at the socket")
    assert 1 <= pool.workers._receiving <= WAITING
    assert pool.workers._receiving + len(pool.workers._parked) == pool.workers.threads <= AT_MOST


# --- what is learned ---------------------------------------------------------------------------------------------


def learned(arrival: float, *took: float) -> _Pace:
    pace = _Pace()
    if arrival:
        pace.arrived(arrival)
    for seconds in took:
        pace.took(seconds)
    return pace


def test_a_kind_of_jobs_that_is_not_known_is_slow() -> None:
    assert _Pace().shared
    assert not _Pace().quick


@pytest.mark.parametrize(
    ("arrival", "took", "helped"),
    [(30e-6, 15e-6, False), (18e-6, 45e-6, False), (50e-6, 265e-6, True), (10e-6, 60e-6, True), (1e-3, 7e-4, False)],
    ids=["no-op", "RSA, wrap", "RSA, unwrap", "RSA on a fast machine", "RSA on an emulated machine"],
)
def test_a_follower_helps_if_it_comes_before_a_quarter_of_the_job_is_over(
    arrival: float, took: float, helped: bool
) -> None:
    pace = learned(arrival, took, took, took)
    assert pace.helped is helped
    assert pace.shared is helped


def test_a_job_that_holds_the_interpreters_lock_gets_no_follower() -> None:
    """The follower comes when the job is over, however long that takes."""
    assert not learned(300e-6, 300e-6, 300e-6).shared


def test_a_follower_is_tried_once_where_it_is_not_known_when_it_comes() -> None:
    pace = learned(0.0, 15e-6, 15e-6)
    assert pace.shared
    assert not pace.helped
    pace.arrived(50e-6)
    pace.took(15e-6)
    assert not pace.shared


def test_a_follower_that_did_not_help_is_tried_again_rarely() -> None:
    pace, tried = learned(50e-6), 0
    for _ in range(10 * _TRIED):
        pace.took(15e-6)
        tried += pace.shared
    assert tried == 10


def test_one_follower_that_comes_late_does_not_count_but_many_do() -> None:
    pace = learned(50e-6, 265e-6)
    pace.arrived(5e-3)
    pace.took(265e-6)
    assert pace.helped
    for _ in range(10):
        pace.arrived(5e-3)
    pace.took(265e-6)
    assert not pace.helped


def test_jobs_too_short_for_a_follower_leave_all_as_it_is_and_longer_ones_count() -> None:
    pace = learned(50e-6, 15e-6, 15e-6)
    for _ in range(100):
        pace.took(150e-6)
    assert pace.least == 15e-6
    assert not pace.shared
    for _ in range(100):
        pace.took(300e-6)
    assert pace.helped
    assert pace.shared


def test_waiting_for_other_threads_does_not_make_a_job_expensive() -> None:
    pace = learned(50e-6, *[15e-6, 15e-6, 15e-6, 90e-6] * 20)
    assert not pace.helped


@pytest.mark.parametrize("cheap_jobs", [1, 3, 5])
def test_a_kind_with_slow_jobs_among_cheap_ones_is_slow(cheap_jobs: int) -> None:
    """Such as names of which some are remembered."""
    pace = learned(50e-6, 15e-6)
    for _ in range(10):
        pace.took(0.03)
        for _ in range(cheap_jobs):
            assert pace.shared
            assert not pace.quick
            pace.took(15e-6)


def test_a_kind_that_was_slow_once_is_quick_again_after_quick_jobs() -> None:
    pace = learned(50e-6, 0.05)
    assert not pace.quick
    for _ in range(20):
        pace.took(15e-6)
    assert pace.quick
    assert not pace.shared
    pace.is_slow()
    assert pace.shared
    assert pace.usual == OVERLONG > QUICK
