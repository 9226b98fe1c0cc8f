"""What tests use to run processes, where a mistake would make tests hang."""

from __future__ import annotations

import _thread
import os
import threading
import time

import pytest

from upcall.testing.processes import _let_threads_leave, in_child


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_fork_waits_for_threads_that_have_ended_for_python_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lock that such a thread holds in a C library would be locked in the child for ever."""
    leaving, here = _thread.allocate_lock(), threading.active_count()
    leaving.acquire()
    _thread.start_new_thread(leaving.acquire, ())  # not counted, as a thread that is running its clean-up
    fork, forked_with, waited = os.fork, [], []

    def sleep(_: float) -> None:
        waited.append(True)
        if leaving.locked() and len(waited) == 1:
            leaving.release()

    def counting_fork() -> int:
        forked_with.append(_threads())
        return fork()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # however busy the machine is
    monkeypatch.setattr(os, "fork", counting_fork)
    assert in_child(lambda: "answered") == "answered"
    assert waited
    assert forked_with == [here]


def test_a_fork_does_not_wait_for_a_library_whose_threads_never_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    staying = _thread.allocate_lock()
    staying.acquire()
    _thread.start_new_thread(staying.acquire, ())
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    try:
        _let_threads_leave()
    finally:
        staying.release()
