"""Sets the attributes of this process: core dumps, limits, scheduling, locked memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from collections.abc import Iterable

from upcall.kernel import libc

_M_ARENA_MAX = -8  # malloc.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


def harden() -> None:
    """Turns off core dumps, ptrace by the same user, and gaining privileges by exec. Needs no privilege."""
    with contextlib.suppress(OSError):  # a service manager's filter may forbid it, after it has set the limit itself
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def share_heap() -> None:
    """Makes all threads allocate from one heap (mallopt(3), M_ARENA_MAX). Call it before threads start: each would
    otherwise get a heap of its own and touch some 200 KB of it. Python's threads allocate one at a time anyway."""
    with contextlib.suppress(AttributeError):  # musl, which has one heap only
        libc.call("mallopt", _M_ARENA_MAX, 1)


def add_groups(names: Iterable[str]) -> None:
    """Adds existing groups of these names to the supplementary groups, if permitted."""
    import grp  # imported by root's daemon only

    found = set(os.getgroups())
    for name in names:
        with contextlib.suppress(KeyError):
            found.add(grp.getgrnam(name).gr_gid)
    with contextlib.suppress(OSError):
        os.setgroups(sorted(found))


def has_terminal() -> bool:
    """Returns whether this process has a controlling terminal. It loses it when the terminal hangs up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def die_with_parent(signal_number: int) -> None:
    """Requests a signal when the parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def raise_descriptor_limit() -> None:
    """Raises the limit of descriptors to the hard limit: one is needed per daemon, requester and device."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prefer_us() -> None:
    """Raises the scheduling priority, if permitted: many processes wait for the broker, and it runs briefly."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def stay_in_memory() -> None:
    """Locks all memory of this process (mlockall(2)), as root; pages that are never touched take none.

    Ordinary users have a limit, above which allocations would fail.
    """
    current, future, on_fault = 1, 2, 4
    if os.geteuid() == 0:
        with contextlib.suppress(OSError, ValueError):  # so that later allocations succeed without CAP_IPC_LOCK
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with contextlib.suppress(OSError):
            libc.call("mlockall", current | future | on_fault)


def _prctl(option: int, value: int) -> None:
    """Calls prctl(2); continues without effect if a seccomp filter refuses it."""
    with contextlib.suppress(OSError):
        libc.call("prctl", option, value, 0, 0, 0)


class LockedMemory:
    """A secret in pages of its own: locked if the limit allows, never dumped, zeroed in a forked child.

    Copies that other Python objects made before are not covered.
    """

    _MADV_DONTDUMP, _MADV_WIPEONFORK = 16, 18

    def __init__(self, secret: bytearray) -> None:
        """Copies the secret and wipes the caller's buffer."""
        self._size = len(secret)
        self._pages = mmap.mmap(-1, max(1, self._size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (self._MADV_DONTDUMP, self._MADV_WIPEONFORK):
            with contextlib.suppress(OSError):
                self._pages.madvise(advice)
        buffer = (ctypes.c_char * len(self._pages)).from_buffer(self._pages)
        self.locked = True
        try:
            libc.call("mlock", ctypes.byref(buffer), ctypes.c_size_t(len(self._pages)))
        except OSError:  # above the limit
            self.locked = False
        finally:
            del buffer
        with memoryview(self._pages) as view:  # slicing the mmap object would make a copy that is never wiped
            view[: self._size] = secret
        secret[:] = bytes(len(secret))

    def copy(self) -> bytearray:
        """Returns a copy of the secret, which the caller must wipe."""
        with memoryview(self._pages) as view:
            return bytearray(view[: self._size])

    def wipe(self) -> None:
        """Zeroes the pages. May be repeated."""
        self._pages[:] = bytes(len(self._pages))
        self._size = 0

    def __repr__(self) -> str:
        return f"<LockedMemory {'locked' if self.locked else 'not locked'}>"


def wipe(data: bytes) -> None:
    """Zeroes the content of a bytes object that is not used elsewhere: a message with a passphrase would otherwise
    stay in memory after it is freed. CPython keeps the content at the end of the object."""
    if len(data) > 1:  # CPython shares shorter ones
        ctypes.memset(id(data) + bytes.__basicsize__ - 1, 0, len(data))


def schedule_as_batch() -> None:
    """Selects SCHED_BATCH: waking this process does not preempt the process that wakes it.

    The kernel's eCryptfs requester sleeps after sending its request without checking for the answer first. An answer
    from a process that preempted it is noticed only after the whole time-out.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
