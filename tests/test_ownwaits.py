"""Self-deadlock detection: requests that are not answered while a thread or child of the daemon waits for eCryptfs.
The wait is played; tests/kernel/test_ownrequests.py has the real one."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from upcall.core.errors import ModuleFailed
from upcall.core.messages import Answer, Refusal
from upcall.daemon.process import Daemon
from upcall.handler import Waits
from upcall.process.log import EventLog
from upcall.process.paths import Place
from upcall.protocols.ecryptfs import self_deadlock as ownwaits
from upcall.protocols.ecryptfs.self_deadlock import PATIENCE, OwnWaits, waiting_for_ecryptfs
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import PATIENCE as PATIENCE_OF_TESTS
from upcall.testing.processes import until
from upcall.wire.envelope import RESPONSE, Envelope, take_message, take_response


class Scene:
    """With a clock that only the test moves: `now`, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(ownwaits, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.refused: list[tuple[str, str]] = []
        self.waiting: list[str] = []
        self.looked = 0
        self.own: OwnWaits[str] = OwnWaits(lambda job, by: self.refused.append((job, by)), self._look)

    def _look(self) -> list[str]:
        self.looked += 1
        return self.waiting

    def refused_after_patience(self) -> bool:
        """Whether something is refused once PATIENCE is over, and nothing before."""
        self.now += PATIENCE - 0.001
        self.own.look()
        early = bool(self.refused)
        self.now += 0.002
        self.own.look()
        return bool(self.refused) and not early


def test_a_request_in_a_self_deadlock_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.waiting = ["thread worker-1", "pid 7 (cat)"]
    scene.own.hold(1, math.inf, "key", "one")
    scene.own.hold(2, math.inf, "key", "two")
    assert scene.own.let_go(2)
    scene.own.look()
    assert not scene.refused  # what can be answered is
    assert not scene.looked  # and until then it costs nothing
    assert scene.refused_after_patience()
    assert scene.refused == [("one", "thread worker-1, pid 7 (cat)")]
    assert not scene.own.let_go(1)  # the worker comes too late
    scene.own.look()
    assert len(scene.refused) == 1


def test_a_key_in_a_self_deadlock_is_refused_at_once_until_its_worker_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was let go of opens the next file, and would wait for whoever answers for that."""
    scene = Scene(monkeypatch)
    scene.waiting = ["thread worker-1"]
    assert scene.own.hold(1, math.inf, "key", "one")
    assert scene.refused_after_patience()
    assert not scene.own.hold(2, math.inf, "key", "two")
    assert scene.own.hold(3, math.inf, "another", "three")
    assert not scene.own.let_go(1)
    assert scene.own.hold(4, math.inf, "key", "four")
    assert scene.own.let_go(3)
    assert scene.own.let_go(4)


def test_a_key_is_served_again_after_the_deadline_of_a_worker_that_never_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one whose request waited in a lane, and was dropped there."""
    scene = Scene(monkeypatch)
    scene.waiting = ["thread worker-1"]
    assert scene.own.hold(1, scene.now + PATIENCE + 0.3, "key", "one")
    assert scene.refused_after_patience()
    assert not scene.own.hold(2, math.inf, "key", "two")
    scene.now += 0.3
    assert scene.own.hold(3, math.inf, "key", "three")


def test_each_request_is_answered_or_refused_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers let go of requests, and take new ones, while another thread refuses late ones."""
    refused: list[int] = []
    own: OwnWaits[int] = OwnWaits(lambda job, by: refused.append(job), lambda: ["thread worker-1"])
    monkeypatch.setattr(ownwaits, "PATIENCE", 0.0)  # each is late at once
    answered: list[int] = []
    over = threading.Event()

    def work(first: int) -> None:
        for seq in range(first, first + 3000):
            assert own.hold(seq, math.inf, f"key {seq}", seq)
            os.sched_yield()
            if own.let_go(seq):
                answered.append(seq)

    def look() -> None:
        while not over.is_set():
            own.look()

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10_000, 20_000)]
    looking = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        looking.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        over.set()
        looking.join()
        sys.setswitchinterval(interval)
    assert sorted(answered + refused) == [first + n for first in (0, 10_000, 20_000) for n in range(3000)]
    assert refused, "the threads have met"
    assert not own.held


def test_slow_requests_are_not_refused_while_nothing_waits_for_ecryptfs(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.own.hold(1, math.inf, "key", "slow")
    for _ in range(3):
        scene.now += PATIENCE
        scene.own.look()
    assert scene.looked == 3
    assert not scene.refused
    assert scene.own.let_go(1)


def test_a_request_past_its_deadline_is_not_refused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.waiting = ["thread worker-1"]
    scene.own.hold(1, scene.now - 1, "key", "late")
    scene.own.look()
    assert not scene.own.held
    assert scene.own.let_go(1)  # the broker counts what comes too late
    assert not scene.refused


def test_a_worker_that_returns_late_does_not_answer_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.waiting = ["thread worker-1"]
    assert scene.own.hold(1, scene.now + PATIENCE + 0.3, "key", "one")
    assert scene.refused_after_patience()
    scene.now += 0.3
    assert scene.own.hold(2, math.inf, "key", "two")
    assert not scene.own.let_go(1)


def test_our_threads_children_and_grandchildren_are_searched_for_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any wait counts here, so that poll(2) stands in for eCryptfs."""
    monkeypatch.setattr(ownwaits, "_WAITS", b"")  # whatever it is in which they wait
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    others = {*waiting_for_ecryptfs()}  # children of earlier tests, which have ended, too
    child = subprocess.Popen([sys.executable, "-c", sleeps], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        found = waiting_for_ecryptfs()
        new = {one for one in found if one.startswith("pid ")} - others
        assert f"thread {threading.current_thread().name}" in found
        assert any(one.startswith(f"pid {child.pid} (python") for one in found)
        assert len(new) == 2
    finally:
        child.communicate(b"\n", timeout=PATIENCE_OF_TESTS)
    monkeypatch.undo()
    assert waiting_for_ecryptfs() == []


# --- a daemon whose key module needs a file that needs the key -------------------------------------------------------


class Kernel:
    """Asks a daemon as eCryptfs does: a process that opens a file waits for the answer."""

    def __init__(self, folder: Path) -> None:
        self._broker = PlayedBroker(folder)
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[threading.Event, list[Answer | Refusal]]] = {}
        self.asked = 0
        self.over = False
        self.registered = threading.Event()

    def run(self) -> None:
        self._broker.register()
        self.registered.set()
        while not self.over:
            with self._lock:
                packet = self._broker.socket.receive()
            if packet is None:
                time.sleep(0.001)
                continue
            if take_message(packet.data).type != RESPONSE:
                continue  # it says goodbye
            response = take_response(packet.data)
            event, outcomes = self._waiting.pop(response.seq)
            outcomes.append(response.outcome)
            event.set()

    def open(self) -> Answer | Refusal:
        event, outcomes = threading.Event(), list[Answer | Refusal]()
        with self._lock:
            self.asked += 1
            self._waiting[self.asked] = event, outcomes
            self._broker.ask(self.asked, b"", "ecryptfs", timeout=3600.0)
        assert event.wait(PATIENCE_OF_TESTS)
        return outcomes[0]


class Needing:
    """To answer it opens one and the same file, which only one can do at a time; until it is warm."""

    services: tuple[str, ...] = ("ecryptfs",)

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._file = kernel, threading.Lock()
        self.cold, self.at_work, self.waiting = True, 0, 0
        self.waits: Waits = OwnWaits[Any](waiting=lambda: ["thread worker-1"] if self.waiting else [])

    def lane(self, envelope: Envelope) -> str:
        return "key"

    def answer(self, envelope: Envelope) -> bytes:
        self.at_work += 1
        try:
            with self._file:
                self.waiting += 1
                if self.cold and isinstance(self._kernel.open(), Refusal):
                    raise ModuleFailed("the file cannot be opened")
                return b"it"
        finally:
            self.waiting -= 1
            self.at_work -= 1


def test_a_module_that_needs_a_file_of_its_own_key_is_refused_and_recovers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for ever what nobody can answer, and afterwards all is as if nothing had been."""
    monkeypatch.setattr(ownwaits, "_ASTRAY", 3600.0)  # a busy machine may need more than 5 s for it
    kernel = Kernel(folder)
    handler = Needing(kernel)
    daemon = Daemon(Place(folder), [handler], log=EventLog("daemon", os.open(folder.parent / "log", os.O_CREAT | 1)))
    threads = [threading.Thread(target=one) for one in (kernel.run, daemon.run)]
    for thread in threads:
        thread.start()
    try:
        assert kernel.registered.wait(PATIENCE_OF_TESTS)
        assert kernel.open() == Refusal("own-request", errno.EDEADLK)  # at its deadline there would be no answer
        until(lambda: not handler.at_work, "everybody has come back")
        assert kernel.asked <= 5
        handler.cold = False
        assert kernel.open() == Answer(b"it")
    finally:
        daemon.stop()
        daemon.stop()
        threads[1].join(PATIENCE_OF_TESTS)
        kernel.over = True
        threads[0].join(PATIENCE_OF_TESTS)
    assert not any(thread.is_alive() for thread in threads)
    assert "deadlock-refused" in (folder.parent / "log").read_text()
