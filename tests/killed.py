"""Kills a child process at a system call of its choice, by ptrace(2): what a command leaves behind is then tested.

The child is a fork, so that no imports are among its system calls. It is stopped at the entry of each; one that is
killed there has not made the call. Only its main thread is stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Final

_LIBC = ctypes.CDLL(None, use_errno=True)
_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_OPTIONS = 1 | 1 << 20  # PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80


class NoPtrace(Exception):
    """This machine does not allow it."""


def step(work: Callable[[], None], at: Callable[[int], bool]) -> int | None:
    """Runs `work` in a child process. `at(number)` is called at the entry of each of its system calls, counted from 0,
    and returns whether the child is killed there. Returns the number of calls if the child has ended; None if it was
    killed. AssertionError if `work` raises."""
    pid = os.fork()
    if pid == 0:
        _be_traced(work)
    _wait_for_stop(pid)
    _ptrace(_SETOPTIONS, pid, _OPTIONS)
    number, entering, passed_on = 0, True, 0
    while True:
        _ptrace(_SYSCALL, pid, passed_on)
        passed_on = 0
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the command has failed"
            return number
        assert os.WIFSTOPPED(status), status
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            passed_on = os.WSTOPSIG(status)
            continue
        if entering and at(number):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        number += entering
        entering = not entering


def _be_traced(work: Callable[[], None]) -> None:
    code = 1
    try:
        if _LIBC.ptrace(_TRACEME, 0, None, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
    finally:
        os._exit(code)


def _wait_for_stop(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise NoPtrace("ptrace is not allowed here")


def _ptrace(request: int, pid: int, data: int) -> None:
    if _LIBC.ptrace(request, pid, None, ctypes.c_void_p(data)) < 0:
        raise NoPtrace(os.strerror(ctypes.get_errno()))
