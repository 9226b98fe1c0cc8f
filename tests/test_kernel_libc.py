"""Calls of the C library by name and number: what fails is an OSError with errno."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from upcall.kernel import libc

_NOT_OPEN = 1 << 20


def test_a_call_gives_what_the_function_returns() -> None:
    assert libc.call("getpid") == os.getpid()


def test_a_call_that_fails_raises_its_errno() -> None:
    with pytest.raises(OSError, match="the thing") as failed:
        libc.call("close", _NOT_OPEN, about="the thing")
    assert (failed.value.errno, failed.value.filename) == (errno.EBADF, "the thing")
    assert libc.errno() == errno.EBADF


def test_an_unknown_system_call_raises_enosys() -> None:
    with pytest.raises(OSError) as failed:
        libc.syscall(1 << 14, 0, None, b"")
    assert failed.value.errno == errno.ENOSYS and failed.value.filename is None


def test_prepared_calls_keep_their_argument_types_to_themselves() -> None:
    first = libc.prepared_syscall(ctypes.c_long, ctypes.c_int, keep_gil=True)
    second = libc.prepared_syscall(ctypes.c_long, ctypes.c_char_p, keep_gil=True)
    assert first.argtypes != second.argtypes
    assert first(1 << 14, 0) == second(1 << 14, None) == -1
    assert libc.error("it").errno == errno.ENOSYS
