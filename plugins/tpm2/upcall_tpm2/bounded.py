"""Runs work with a time-out, in a thread of its own.

Calls of the TPM library block without a time-out, and a thread cannot be killed. So after the time-out the caller gets
an error, the thread is left behind, and a late result is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from upcall.core.errors import ModuleFailed

T = TypeVar("T")


class _Job(Generic[T]):
    def __init__(self, work: Callable[[], T], drop: Callable[[T], None]) -> None:
        self._work, self._drop = work, drop
        self._lock = threading.Lock()
        self._given_up = False
        self.results: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            self.error = error
            return
        with self._lock:
            if not self._given_up:
                self.results.append(result)
                return
        self._drop(result)

    def give_up(self) -> None:
        with self._lock:
            self._given_up = True


def _keep(_: object) -> None:
    return None


def within(seconds: float, what: str, work: Callable[[], T], drop: Callable[[T], None] = _keep) -> T:
    """Returns or raises what `work` does. ModuleFailed with the text `what` after `seconds`. `drop`: receives a late
    result, for wiping."""
    job = _Job(work, drop)
    thread = threading.Thread(target=job.run, name="tpm2", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        job.give_up()
    if job.results:
        return job.results[0]
    if job.error is not None:
        raise job.error
    raise ModuleFailed(f"{what}: no answer within {seconds:g} s")
