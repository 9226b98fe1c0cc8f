"""What a process asks the kernel about itself and about others."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from collections.abc import Iterable

from upcall.kernel import libc

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


def harden() -> None:
    """No core dumps, no ptrace by the same user, no gain of privileges. Works without any privilege."""
    with contextlib.suppress(OSError):  # where a service manager has set it and lets nobody else do so
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def add_groups(names: Iterable[str]) -> None:
    """To the groups that we are in: those of them that there are, if we may."""
    import grp  # only root's daemon pays for it

    found = set(os.getgroups())
    for name in names:
        with contextlib.suppress(KeyError):
            found.add(grp.getgrnam(name).gr_gid)
    with contextlib.suppress(OSError):
        os.setgroups(sorted(found))


def has_terminal() -> bool:
    """Whether this process has a controlling terminal. It loses it when the terminal hangs up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def die_with_parent(signal_number: int) -> None:
    """Asks for a signal when the parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def raise_descriptor_limit() -> None:
    """As many descriptors as we may have: one per daemon, requester and device."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prefer_us() -> None:
    """Before others on the processor, if we may: many wait for the broker, and it never works for long."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def stay_in_memory() -> None:
    """Nothing of this process is ever taken back from memory (mlockall(2)); what it never touches costs nothing.

    For root only: others have a limit, behind which new memory would be refused.
    """
    current, future, on_fault = 1, 2, 4
    if os.geteuid() == 0:
        with contextlib.suppress(OSError, ValueError):  # so that it stays so without CAP_IPC_LOCK
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with contextlib.suppress(OSError):
            libc.call("mlockall", current | future | on_fault)


def _prctl(option: int, value: int) -> None:
    """Where a seccomp filter refuses it, the process goes on without."""
    with contextlib.suppress(OSError):
        libc.call("prctl", option, value, 0, 0, 0)


class LockedMemory:
    """A secret in a page of its own: locked where the limit allows, never dumped, zeroed in a forked child.

    What Python cannot promise: copies that other objects made on the way here.
    """

    _MADV_DONTDUMP, _MADV_WIPEONFORK = 16, 18

    def __init__(self, secret: bytearray) -> None:
        """Takes the secret over: the caller's buffer is wiped."""
        self._size = len(secret)
        self._pages = mmap.mmap(-1, max(1, self._size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (self._MADV_DONTDUMP, self._MADV_WIPEONFORK):
            with contextlib.suppress(OSError):
                self._pages.madvise(advice)
        buffer = (ctypes.c_char * len(self._pages)).from_buffer(self._pages)
        self.locked = True
        try:
            libc.call("mlock", ctypes.byref(buffer), ctypes.c_size_t(len(self._pages)))
        except OSError:  # the limit
            self.locked = False
        finally:
            del buffer
        with memoryview(self._pages) as view:  # a slice of the pages themselves would be a copy that nobody wipes
            view[: self._size] = secret
        secret[:] = bytes(len(secret))

    def copy(self) -> bytearray:
        """The secret in a buffer that the caller wipes."""
        with memoryview(self._pages) as view:
            return bytearray(view[: self._size])

    def wipe(self) -> None:
        self._pages[:] = bytes(len(self._pages))
        self._size = 0

    def __repr__(self) -> str:
        return f"<LockedMemory {'locked' if self.locked else 'not locked'}>"


def wipe(data: bytes) -> None:
    """Zeroes the content of an object that nothing else uses any more: a message with a passphrase, which would stay
    in memory after it was freed. CPython: the content is at the object's end."""
    if len(data) > 1:  # shorter ones are shared
        ctypes.memset(id(data) + bytes.__basicsize__ - 1, 0, len(data))


def schedule_as_batch() -> None:
    """SCHED_BATCH: waking us does not preempt whoever woke us.

    The kernel's eCryptfs requester goes to sleep after it has sent its request without looking whether the
    answer is there already; an answer that preempts it is not seen before the whole timeout is over.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
