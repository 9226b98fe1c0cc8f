"""Wraps and unwraps with an opened key, and verifies what its module returns."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from upcall.core.errors import Refused
from upcall.keymodule import MAX_KEY, MAX_WRAPPED, Closable, KeyHandle, Watched
from upcall.protocols.ecryptfs.authtok import AuthTok

REREAD: Final = 1.0  # seconds after which the auth token is read again: it can be replaced in place


class Opened:
    """An opened key. Thread-safe if its handle is. A wrapped key is verified by unwrapping it, at the first of each
    size; always if `prove_all`."""

    __slots__ = ("_handle", "_prove_all", "_proved", "_watched", "module", "reread", "serial", "token")

    def __init__(self, handle: KeyHandle, module: str, serial: int, token: AuthTok, prove_all: bool) -> None:
        self._handle, self.module, self.serial, self.token = handle, module, serial, token
        self._watched = handle if isinstance(handle, Watched) else None
        self._prove_all = prove_all
        self._proved: dict[int, int] = {}  # size of a clear key -> size of its wrapped form
        self.reread = time.monotonic() + REREAD

    def stale(self) -> bool:
        return self._watched is not None and self._watched.stale()

    def close(self) -> None:
        """Closes the handle. Exceptions of the module are ignored."""
        if isinstance(self._handle, Closable):
            with contextlib.suppress(Exception):
                self._handle.close()

    def unwrap(self, wrapped: bytes) -> bytes:
        key = self._handle.unwrap(wrapped)
        if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY:
            raise Refused("module-broke", why=f"{self.module}: the unwrapped key has a wrong type or size")
        return key

    def wrap(self, key: bytes) -> bytes:
        """Returns a wrapped key that was verified. The kernel stores any answer, and the file would be lost.

        Refused("module-broke") if the module returns a wrong type or size, or another key. Else as the module."""
        wrapped = self._handle.wrap(key)
        if not isinstance(wrapped, bytes) or not len(key) <= len(wrapped) <= MAX_WRAPPED:
            raise Refused("module-broke", why=f"{self.module}: the wrapped key has a wrong type or size")
        if self._prove_all or self._proved.get(len(key)) != len(wrapped):
            if self.unwrap(wrapped) != key:
                raise Refused("module-broke", why=f"{self.module}: what it wrapped does not unwrap to the same")
            self._proved[len(key)] = len(wrapped)
        return wrapped
