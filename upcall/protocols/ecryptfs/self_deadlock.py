"""Self-deadlock detection: refuses requests of eCryptfs that wait for the daemon itself.

Cause: a C library in the daemon, or a child of the daemon, opens a file on the user's eCryptfs mount. (What Python
opens is refused before, by own_files.py.) The kernel does not report the requester of an eCryptfs request. Therefore a
request is refused if it has not been answered for PATIENCE seconds while a thread or child of the daemon waits in the
kernel's eCryptfs code. That ends the wait. A request that can be answered is answered, also if it is the daemon's own.

The thread whose wait has ended may open the next file. Therefore a request for the same key is refused at once until
the worker of the refused one has returned; otherwise each file would wait for PATIENCE again, without end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from upcall.kernel import procfs

Job = TypeVar("Job")

PATIENCE: Final = 0.5  # seconds that a request may take while a thread or child of the daemon waits
_ASTRAY: Final = 5.0  # seconds until the worker of a refused request is ignored: the kernel's time-out is 3 s
_REMEMBERED: Final = 60.0  # seconds after that in which its late answer is still suppressed
_WAITS: Final = b"ecryptfs_"  # prefix of the kernel functions that wait: /proc/PID/wchan, proc(5)
_GENERATIONS: Final = 4  # of descendants that are searched


class OwnWaits(Generic[Job]):
    """Implements upcall.handler.Waits for eCryptfs. Thread-safe.

    `refuse(job, by)` refuses a request; `by`: the waiting threads and processes, for people. `waiting()` returns them.
    """

    services: tuple[str, ...] = ("ecryptfs",)

    def __init__(
        self,
        refuse: Callable[[Job, str], None] = lambda job, by: None,
        waiting: Callable[[], list[str]] | None = None,
    ) -> None:
        self.refuse, self._waiting = refuse, waiting or waiting_for_ecryptfs
        self._lock = threading.Lock()
        # By sequence number: (time of receipt, deadline, key, job); seconds of CLOCK_MONOTONIC. Items are set and
        # popped without the lock, which CPython does atomically: who pops one answers the request.
        self._held: dict[int, tuple[float, float, str, Job]] = {}
        # Refused while a worker still handles it: (until when requests for the key are refused at once, key)
        self._astray: dict[int, tuple[float, str]] = {}

    def hold(self, seq: int, deadline: float, key: str, job: Job) -> bool:
        """Registers a request. `deadline`: seconds of CLOCK_MONOTONIC. False: the caller must refuse it at once, since
        the worker of a refused request for the same `key` has not returned."""
        now = time.monotonic()
        if self._astray:  # without the lock: a request that is refused meanwhile may as well have come later
            with self._lock:
                self._astray = {seq: one for seq, one in self._astray.items() if one[0] > now - _REMEMBERED}
                if any(until > now and refused == key for until, refused in self._astray.values()):
                    return False
        self._held[seq] = now, deadline, key, job
        return True

    def let_go(self, seq: int) -> bool:
        """Unregisters a request. Returns whether to answer it: not if it was refused meanwhile. The broker rejects
        answers after the deadline."""
        if self._held.pop(seq, None) is not None:  # what `look` has refused, it has removed before
            return True
        with self._lock:
            return self._astray.pop(seq, None) is None

    @property
    def held(self) -> int:
        """How many requests are registered."""
        return len(self._held)

    def look(self) -> None:
        """Refuses registered requests that take longer than PATIENCE while a thread or child waits for eCryptfs. Call
        it every few milliseconds while requests are handled; it reads /proc only when one is late."""
        now = time.monotonic()
        with self._lock:
            held = self._held.copy()
            for seq in [seq for seq, (_, deadline, _, _) in held.items() if deadline <= now]:
                self._held.pop(seq, None)  # the broker has refused it
            late = [seq for seq, (since, deadline, _, _) in held.items() if now - since >= PATIENCE and deadline > now]
        if not late or not (waiting := self._waiting()):
            return
        for seq in late:
            with self._lock:
                one = self._held.pop(seq, None)
                if one is not None:
                    self._astray[seq] = min(one[1], now + _ASTRAY), one[2]
            if one is not None:
                self.refuse(one[3], ", ".join(waiting))


def waiting_for_ecryptfs() -> list[str]:
    """Returns this process's threads and descendants that wait for eCryptfs, as "NAME (PID)" for people. Processes
    whose /proc/PID/wchan this process may not read are not seen."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = [f"thread {names.get(task, task)}" for task in procfs.tasks() if _waits(task)]
    family: list[int] = procfs.children()
    for _ in range(_GENERATIONS):
        found += [
            f"pid {pid} ({_name(pid)})" for pid in family if any(_waits(task, pid) for task in procfs.tasks(pid))
        ]
        family = [child for pid in family for child in procfs.children(pid)]
    return found


def _waits(task: int, pid: int | None = None) -> bool:
    return procfs.task_text(task, "wchan", pid).startswith(_WAITS)


def _name(pid: int) -> str:
    return procfs.task_text(pid, "comm", pid).decode("utf-8", "replace").strip()
