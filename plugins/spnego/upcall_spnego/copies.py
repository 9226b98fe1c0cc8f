"""Copies file caches to memory caches, because libgssapi reads a file four times for one session.

A copy is valid while the file's inode, size and times are unchanged, so kinit and kdestroy take effect at once. A file
that was changed less than _SETTLED seconds ago is not copied: another change might not change its times.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from upcall_spnego.krb5 import Context, Held

MOST: Final = 8  # limit of copies
_SETTLED: Final = 2.0  # seconds: more than the resolution of any file system's times
_Stamp = tuple[int, ...]


class _Copy(NamedTuple):
    stamp: _Stamp
    name: str  # MEMORY:...
    held: Held
    offset: int  # seconds by which the KDC's clock is ahead of ours


class Copies:
    """The copies. Thread-safe. Must be used within `with copies:`; outdated copies are destroyed when no thread is in
    such a block."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._copies: dict[str, _Copy] = {}  # by the path of the file
        self._useless: list[str] = []
        self._users = self._made = 0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            useless = [] if self._users else self._useless
            if useless:
                self._useless = []
        if useless:
            with Context() as krb5:
                for name in useless:
                    krb5.destroy(name)

    def look(self, krb5: Context, name: str) -> tuple[Held, str]:
        """Returns a cache's content, and the name to open it by: that of the copy, if there is one. OSError,
        Krb5Error."""
        if not name.startswith("FILE:"):
            return krb5.look(name), name
        path = name.removeprefix("FILE:")
        stamp, now = _stamp(path), self._clock()
        with self._lock:
            copy = self._copies.get(path)
            if copy is not None and copy.stamp != stamp:
                self._drop(path)
                copy = None
        if copy is None:
            copy = self._copied(krb5, path, stamp, now)
        if copy is None:
            return krb5.look(name), name
        return copy.held._replace(now=int(now) + copy.offset), copy.name

    def _copied(self, krb5: Context, path: str, stamp: _Stamp, now: float) -> _Copy | None:
        """Copies a file cache. None if the file was changed recently, or meanwhile."""
        *_, modified, changed = stamp
        if not max(modified, changed) / 1e9 < now - _SETTLED:
            return None
        with self._lock:
            self._made += 1
            name = f"MEMORY:upcall-spnego-copy-{self._made}"
            self._useless.append(name)  # until the copy is complete
        krb5.copy(f"FILE:{path}", name)
        held = krb5.look(name)
        with self._lock:
            if path in self._copies or _stamp(path) != stamp:
                return self._copies.get(path)
            self._useless.remove(name)
            while len(self._copies) >= MOST:
                self._drop(next(iter(self._copies)))
            copy = self._copies[path] = _Copy(stamp, name, held, held.now - int(now))
        return copy

    def sweep(self) -> None:
        """Drops outdated copies, also of files that no request uses any more."""
        with self._lock:
            for path, copy in tuple(self._copies.items()):
                try:
                    good = _stamp(path) == copy.stamp
                except OSError:
                    good = False
                if not good:
                    self._drop(path)

    def _drop(self, path: str) -> None:
        self._useless.append(self._copies.pop(path).name)


def _stamp(path: str) -> _Stamp:
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
