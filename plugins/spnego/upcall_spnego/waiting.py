"""Who waits for which realm's KDC: one that is dead must not take all of the daemon's workers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from upcall.core.errors import Refused

OVERLONG: Final = 2.0  # seconds after which a KDC counts as one that does not answer
AT_MOST: Final = 4  # requests that wait for such a KDC; the next ones are refused at once


class Waiting:
    """libkrb5 gives up on a KDC after 10 to 30 s, and nobody can interrupt it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def for_kdc(self, realm: str) -> Iterator[None]:
        """Refused if too many have been waiting for too long."""
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
