"""Limits the duration of conversations: a socket's time-out bounds each call only, so a slow peer could prolong
them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def cut_off(seconds: float, connection: Callable[[], socket.socket | None]) -> Iterator[None]:
    """Shuts down the socket after `seconds`, so that blocked calls on it return. TimeoutError if the block ends
    normally after that. `connection()`: returns the socket, or None before it is connected."""
    over = threading.Event()

    def cut() -> None:
        over.set()
        found = connection()
        if found is not None:
            with contextlib.suppress(OSError):
                # The plain socket's method: that of a TLS socket would drop TLS state that another thread uses.
                socket.socket.shutdown(found, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if over.is_set():
        raise TimeoutError(f"not done within {seconds:g} s")
