"""Implements hostile key modules and daemons."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from upcall_rsa import module as openssl

from upcall.keymodule import API, KeyHandle, Secrets
from upcall.wire.envelope import Envelope

Verb = Callable[[KeyHandle, bytes], object]


class _Handle:
    def __init__(self, real: KeyHandle, wrap: Verb | None, unwrap: Verb | None) -> None:
        self._real, self._wrap, self._unwrap = real, wrap, unwrap

    def wrap(self, key: bytes, /) -> bytes:
        return self._real.wrap(key) if self._wrap is None else self._wrap(self._real, key)  # type: ignore[return-value]

    def unwrap(self, wrapped: bytes, /) -> bytes:
        if self._unwrap is None:
            return self._real.unwrap(wrapped)
        return self._unwrap(self._real, wrapped)  # type: ignore[return-value]

    def stale(self) -> bool:
        return False


class HostileModule:
    """Opens keys as the openssl module does; a given verb replaces that of the opened key."""

    name, api = "openssl", API

    def __init__(self, wrap: Verb | None = None, unwrap: Verb | None = None) -> None:
        self._wrap, self._unwrap = wrap, unwrap

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        return _Handle(openssl.open(signature, blob, secrets), self._wrap, self._unwrap)


_libc = ctypes.CDLL(None)
COLD = "UPCALL_TEST_COLD"  # the variable with the path of a file that a C library reads


def read_in_c(path: str | Path) -> None:
    """Opens a file by a system call, as a C library does: Python's hooks do not see it."""
    fd = _libc.open(os.fsencode(path), os.O_RDONLY | os.O_CLOEXEC)
    if fd >= 0:
        os.close(fd)


def _reads_in_c(handle: KeyHandle, wrapped: bytes) -> bytes:
    read_in_c(os.environ[COLD])
    return handle.unwrap(wrapped)


reads_in_c = HostileModule(unwrap=_reads_in_c)


class LyingDaemon:
    """A handler without the daemon's own checks: what `answer` returns is sent to the broker."""

    services: tuple[str, ...] = ("ecryptfs",)

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer

    def lane(self, envelope: Envelope, /) -> str:
        return "the only one"

    def answer(self, envelope: Envelope, /) -> bytes:
        return self._answer(envelope.body)
