"""Limits the requests that wait for an unresponsive KDC, so that they do not use all of the daemon's workers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from upcall.core.errors import Refused

OVERLONG: Final = 2.0  # seconds after which a KDC counts as unresponsive
AT_MOST: Final = 4  # requests that may wait for such a KDC; further ones are refused at once


class Waiting:
    """Counts waiting requests by realm. Thread-safe. Needed because libkrb5's time-out for a KDC is 10 to 30 s, and
    its calls cannot be interrupted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def for_kdc(self, realm: str) -> Iterator[None]:
        """A context for a call that may wait for the realm's KDC. Refused if AT_MOST calls have waited for
        OVERLONG."""
        now = self._clock()
        with self._lock:
            begun = self._since.setdefault(realm, [])
            if sum(now - one > OVERLONG for one in begun) >= AT_MOST:
                raise Refused("kdc-unreachable", why=f"{len(begun)} requests wait for the KDC of {realm} already")
            begun.append(now)
        try:
            yield
        finally:
            with self._lock:
                begun.remove(now)
                if not begun:
                    del self._since[realm]

    def count(self, realm: str) -> int:
        with self._lock:
            return len(self._since.get(realm, ()))
