"""A daemon that waits for itself after all: a C library, or a child, has opened a file on the user's eCryptfs mount.

The kernel does not say who waits for a request of eCryptfs. So it is not asked whose a request is, but whether it can
be answered: what could not be for a while, while somebody of ours waits for eCryptfs, is refused, and that lets go of
them. What can be answered is, whoever asks.

Who is let go of may go on, and open the next file: a request for the same key that comes while the worker of a refused
one has not come back is refused at once. Otherwise each would have the next one wait, for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

Job = TypeVar("Job")

PATIENCE: Final = 0.5  # seconds that a request may take while one of ours waits
_ASTRAY: Final = 5.0  # seconds, then a worker of a refused request does not count any more: the kernel waits for 3
_REMEMBERED: Final = 60.0  # seconds more in which it is known, if it comes back after all, that it was refused
_WAITS: Final = b"ecryptfs_"  # how the kernel's functions begin in which one waits (proc(5), wchan)
_GENERATIONS: Final = 4


class OwnWaits(Generic[Job]):
    """upcall.handler.Waits for eCryptfs. `refuse(job, by)` answers a request; `by`: who of ours waits, for people."""

    services: tuple[str, ...] = ("ecryptfs",)

    def __init__(
        self,
        refuse: Callable[[Job, str], None] = lambda job, by: None,
        waiting: Callable[[], list[str]] | None = None,
    ) -> None:
        self.refuse, self._waiting = refuse, waiting or waiting_for_ecryptfs
        self._lock = threading.Lock()
        # by sequence number: since when, until when, for which key, what
        self._held: dict[int, tuple[float, float, str, Job]] = {}
        # Refused, and somebody is at work on it still: until when, for which key.
        self._astray: dict[int, tuple[float, str]] = {}

    def hold(self, seq: int, deadline: float, key: str, job: Job) -> bool:
        """A request has come, and is to be answered before `deadline` by whoever lets go of it. False: at once, with a
        refusal."""
        now = time.monotonic()
        with self._lock:
            if self._astray:
                self._astray = {seq: one for seq, one in self._astray.items() if one[0] > now - _REMEMBERED}
                if any(until > now and refused == key for until, refused in self._astray.values()):
                    return False
            self._held[seq] = now, deadline, key, job
        return True

    def let_go(self, seq: int) -> bool:
        """Whether to answer it; not if it was refused meanwhile. What comes too late is the broker's to reject."""
        with self._lock:
            self._held.pop(seq, None)
            return self._astray.pop(seq, None) is None

    @property
    def held(self) -> int:
        """How many are still to be answered."""
        return len(self._held)

    def look(self) -> None:
        """To be called now and then while requests are worked on."""
        now = time.monotonic()
        with self._lock:
            for seq in [seq for seq, (_, deadline, _, _) in self._held.items() if deadline <= now]:
                del self._held[seq]  # the broker has answered
            late = [seq for seq, (since, _, _, _) in self._held.items() if now - since >= PATIENCE]
        if not late or not (waiting := self._waiting()):
            return
        for seq in late:
            with self._lock:
                held = self._held.pop(seq, None)
                if held is not None:
                    self._astray[seq] = min(held[1], now + _ASTRAY), held[2]
            if held is not None:
                self.refuse(held[3], ", ".join(waiting))


def waiting_for_ecryptfs() -> list[str]:
    """Our threads, and our children and theirs, that wait for eCryptfs. Those who let nobody look are not seen."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    me = Path("/proc/self")
    found = [f"thread {names.get(task.name, task.name)}" for task in _waiting_tasks(me)]
    family = [me]
    for _ in range(_GENERATIONS):
        family = [child for one in family for child in _children(one)]
        found += [f"pid {child.name} ({_name(child)})" for child in family if _waiting_tasks(child)]
    return found


def _tasks(process: Path) -> list[Path]:
    try:
        return list((process / "task").iterdir())
    except OSError:
        return []


def _waiting_tasks(process: Path) -> list[Path]:
    return [task for task in _tasks(process) if _read(task / "wchan").startswith(_WAITS)]


def _children(process: Path) -> list[Path]:
    return [Path("/proc", pid.decode()) for task in _tasks(process) for pid in _read(task / "children").split()]


def _name(process: Path) -> str:
    return _read(process / "comm").decode("utf-8", "replace").strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is not to be looked at
        return b""
