"""An end for conversations: a timeout on a socket only bounds each single wait, and a peer can drip."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def cut_off(seconds: float, connection: Callable[[], socket.socket | None]) -> Iterator[None]:
    """After so many seconds both directions of the socket are shut, and whoever waits on it gets an error or an end;
    TimeoutError if the block takes that for a good one."""
    over = threading.Event()

    def cut() -> None:
        over.set()
        found = connection()
        if found is not None:
            with contextlib.suppress(OSError):
                # The plain socket's: that of TLS would first take its state away from the thread that uses it.
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
