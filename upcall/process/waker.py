"""Wakes a waiting loop from signal handlers and other threads, through a socket pair."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable


class Waker:
    """Is readable after `wake` or a signal, until `heard`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        """Makes it readable. May be called from any thread or signal handler."""
        with contextlib.suppress(OSError):  # it is readable already, or closed
            self._writer.send(b"x")

    def heard(self) -> None:
        """Makes it unreadable again. Blocks unless it is readable."""
        self._reader.recv(64)

    def heed_signals(self, stop: Callable[..., None]) -> None:
        """Installs `stop` as the handler of SIGTERM and SIGINT. In the main thread only."""
        # Python runs handlers when the loop wakes: a signal that arrives just before the wait must end it, too.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def close(self) -> None:
        """Closes both sockets. In the main thread also removes the signal wake-up descriptor."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()
