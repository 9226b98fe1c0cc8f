"""The C library by ctypes: calls that Python's `os` lacks, with errno as OSError. The one place that loads it.

Arguments are converted as ctypes does: int, bytes, None and ctypes objects. A variadic function or a system call takes
a plain int as a C int, whose upper half is undefined where the kernel reads a long: `syscall` therefore passes each
int as a long.
Source: syscall(2), errno(3).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
# Keeps the GIL during the call: for calls that take about a microsecond and never wait.
_KEEPING_GIL: Final = ctypes.PyDLL(None, use_errno=True)


def call(name: str, *arguments: Any, about: str | None = None) -> int:
    """What the function `name` returns. OSError if that is negative, with `about` as its filename."""
    return checked(int(_LIBC[name](*arguments)), about)


def function(name: str) -> Any:
    """The function itself, looked up now: a child may call it between fork and exec, where nothing may be loaded."""
    return _LIBC[name]


def syscall(number: int, *arguments: Any, about: str | None = None) -> int:
    """The same for a system call by its number on this machine."""
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    return checked(int(_SYSCALL(ctypes.c_long(number), *words)), about)


def checked(result: int, about: str | None = None) -> int:
    """`result` unless it is negative: then OSError by the errno of this thread's last call."""
    if result < 0:
        raise error(about)
    return result


def error(about: str | None = None) -> OSError:
    """OSError by the errno of this thread's last call."""
    code = errno()
    return OSError(code, os.strerror(code), about) if about is not None else OSError(code, os.strerror(code))


def errno() -> int:
    """Of this thread's last call by this module."""
    return ctypes.get_errno()


def prepared_syscall(*argtypes: Any, keep_gil: bool = False) -> Any:
    """syscall(2) as a function object of its own, for the hot path: `argtypes` (the number's first) are set once, or
    the caller passes ctypes objects. It gives a negative number instead of raising: see `error`."""
    function = (_KEEPING_GIL if keep_gil else _LIBC)["syscall"]
    function.restype = ctypes.c_long
    if argtypes:
        function.argtypes = argtypes
    return function


_SYSCALL: Final = prepared_syscall()
