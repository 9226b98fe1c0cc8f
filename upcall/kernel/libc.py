"""Calls functions of the C library that Python's `os` lacks, by ctypes; errno becomes OSError. No other module loads
it.

Arguments are converted as by ctypes: int, bytes, None and ctypes objects. A variadic function or system call receives
a plain int as a C int, whose upper half is undefined where the kernel reads a long: so `syscall` passes each int as a
long. Source: syscall(2), errno(3).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
# Keeps the GIL during the call: for calls that take about a microsecond and never block.
_KEEPING_GIL: Final = ctypes.PyDLL(None, use_errno=True)


def call(name: str, *arguments: Any, about: str | None = None) -> int:
    """Calls the function `name` and returns its result. OSError if that is negative, with `about` as its filename."""
    return checked(int(_LIBC[name](*arguments)), about)


def function(name: str) -> Any:
    """Returns the function object: a child may call it between fork and exec, where nothing may be loaded."""
    return _LIBC[name]


def syscall(number: int, *arguments: Any, about: str | None = None) -> int:
    """Makes a system call by its number on this architecture and returns its result. OSError as `call`."""
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    return checked(int(_SYSCALL(ctypes.c_long(number), *words)), about)


def checked(result: int, about: str | None = None) -> int:
    """Returns `result` unless it is negative; otherwise raises OSError from the errno of this thread's last call."""
    if result < 0:
        raise error(about)
    return result


def error(about: str | None = None) -> OSError:
    """Returns an OSError from the errno of this thread's last call."""
    code = errno()
    return OSError(code, os.strerror(code), about) if about is not None else OSError(code, os.strerror(code))


def errno() -> int:
    """Returns the errno of this thread's last call through this module."""
    return ctypes.get_errno()


def prepared_syscall(*argtypes: Any, keep_gil: bool = False) -> Any:
    """Returns syscall(2) as a function object for the hot path. `argtypes` (the number's first) are set once, or the
    caller passes ctypes objects. It returns a negative number instead of raising: see `error`."""
    function = (_KEEPING_GIL if keep_gil else _LIBC)["syscall"]
    function.restype = ctypes.c_long
    if argtypes:
        function.argtypes = argtypes
    return function


_SYSCALL: Final = prepared_syscall()
