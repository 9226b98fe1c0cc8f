"""A key that its module has opened for the daemon."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from upcall.core.errors import Refused
from upcall.keymodule import MAX_KEY, MAX_WRAPPED, Closable, KeyHandle, Watched
from upcall.protocols.ecryptfs.authtok import AuthTok

REREAD: Final = 1.0  # seconds after which an auth token that was replaced in its place is noticed


class Opened:
    """A key in use. What it wraps is proved by unwrapping it, the first time for each size."""

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
        """Lets go of what the handle holds; a module that fails at that has nothing more to say."""
        if isinstance(self._handle, Closable):
            with contextlib.suppress(Exception):
                self._handle.close()

    def unwrap(self, wrapped: bytes) -> bytes:
        key = self._handle.unwrap(wrapped)
        if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY:
            raise Refused("module-broke")
        return key

    def wrap(self, key: bytes) -> bytes:
        """A wrapped key that can be unwrapped: the kernel would believe anything, and lose the file."""
        wrapped = self._handle.wrap(key)
        if not isinstance(wrapped, bytes) or not len(key) <= len(wrapped) <= MAX_WRAPPED:
            raise Refused("module-broke")
        if self._prove_all or self._proved.get(len(key)) != len(wrapped):
            if self.unwrap(wrapped) != key:
                raise Refused("module-broke")
            self._proved[len(key)] = len(wrapped)
        return wrapped
