"""Waking a loop that waits: for signal handlers and other threads."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable


class Waker:
    """Readable from `wake`, or a signal that is heeded, until `heard`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or has ended
            self._writer.send(b"x")

    def heard(self) -> None:
        """Only when it is readable."""
        self._reader.recv(64)

    def heed_signals(self, stop: Callable[..., None]) -> None:
        """SIGTERM and SIGINT call `stop`. In the main thread."""
        # Python's handlers run when the loop wakes: a signal that comes just before it waits must wake it, too.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def close(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()
