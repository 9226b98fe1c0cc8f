"""What tests use to run processes, where a mistake would make tests hang."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from upcall.testing.processes import _let_threads_leave, in_child

LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def a_thread_that_python_does_not_know() -> Iterator[Callable[[], None]]:
    """As one that has ended for Python, and runs the clean-up of C libraries. Yields what makes it end."""
    semaphore, thread = ctypes.create_string_buffer(64), ctypes.c_ulong()
    LIBC.sem_init(semaphore, 0, 0)
    waits = ctypes.cast(LIBC.sem_wait, ctypes.c_void_p)
    assert LIBC.pthread_create(ctypes.byref(thread), None, waits, semaphore) == 0
    ended: list[bool] = []

    def end() -> None:
        if not ended:
            ended.append(True)
            LIBC.sem_post(semaphore)

    try:
        yield end
    finally:
        end()
        LIBC.pthread_join(thread, None)


def unknown_threads() -> int:
    return len(os.listdir("/proc/self/task")) - len(sys._current_frames())


def test_a_fork_waits_for_threads_that_have_ended_for_python_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that such a thread holds in a C library would be locked in the child for ever."""
    if unknown_threads():
        pytest.skip("a library has threads of its own here")
    fork, unknown = os.fork, list[int]()

    def counting_fork() -> int:
        unknown.append(unknown_threads())
        return fork()

    with a_thread_that_python_does_not_know() as end:
        monkeypatch.setattr(time, "sleep", lambda _: end())
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # however busy the machine is
        monkeypatch.setattr(os, "fork", counting_fork)
        assert in_child(lambda: "answered") == "answered"
    assert unknown == [0]


def test_a_fork_does_not_wait_for_ever_for_a_library_whose_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    with a_thread_that_python_does_not_know():
        monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
        _let_threads_leave()
