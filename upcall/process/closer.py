"""Closes connections whose messages carry descriptors, in threads of its own, because the sender controls how long
that takes (a TCP socket that lingers, a huge file). The number of unfinished closes is counted per person and bounded
by the listener.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from queue import SimpleQueue

_THREADS = 4


class Closer:
    """Closes sockets in up to four threads. Its methods are called in the loop's thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[socket.socket, int]] = SimpleQueue()
        self._lock = threading.Lock()
        self._stuck: Counter[int] = Counter()  # by person
        self._threads = 0

    def stuck(self, person: int) -> int:
        """Returns how many connections of a person are not closed yet."""
        return self._stuck[person] if self._stuck else 0

    def close(self, connection: socket.socket, person: int) -> None:
        """Closes a connection in another thread. Does not block."""
        with self._lock:
            self._stuck[person] += 1
        self._queue.put((connection, person))
        if self._threads < _THREADS:
            self._threads += 1
            threading.Thread(target=self._work, name=f"closer-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        while True:
            connection, person = self._queue.get()
            with contextlib.suppress(OSError):
                connection.close()
            with self._lock:
                self._stuck[person] -= 1
                if not self._stuck[person]:
                    del self._stuck[person]
