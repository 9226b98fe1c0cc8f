"""What a service tells its manager, by sd_notify(3): it serves, it is alive, it reads its configuration, it ends.

Source: sd_notify(3), sd_watchdog_enabled(3), unix(7). A datagram for each word is the whole of it: a library for it
would be longer than this, and one more thing in processes that are to stay small.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final

_ADDRESS, _INTERVAL, _WHOSE = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_PER_INTERVAL: Final = 3  # words in the time after which we would be taken for dead


class Manager:
    """Whoever started us and listens; nobody, mostly: then every word is for nothing, and `next_wake` is inf."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Takes the variables out of the environment: what we start must not speak for us."""
        address = environment.pop(_ADDRESS, "")
        interval, whose = environment.pop(_INTERVAL, ""), environment.pop(_WHOSE, "")
        self._socket: socket.socket | None = None
        self._every = float("inf")
        self._due = float("inf")
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            self._address = address if address[0] == "/" else "\0" + address[1:]
            if interval.isdecimal() and int(interval) and whose in ("", str(os.getpid())):
                self._every = int(interval) / 1e6 / _PER_INTERVAL
                self._due = 0.0

    def ready(self, status: str) -> None:
        """We serve. `status` is for people."""
        self._tell(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._tell(f"STATUS={status}")

    def reloading(self) -> None:
        """Until the next `ready`."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def alive(self, now: float, progress: Callable[[], bool] = lambda: True) -> None:
        """To be called with the monotonic time by whoever does not hang; tells it when it is due, unless there is no
        `progress` elsewhere: then the manager's patience runs out."""
        if now >= self._due:
            self._due = now + self._every
            if progress():
                self._tell("WATCHDOG=1")

    def next_wake(self) -> float:
        """When `alive` must be called at the latest (monotonic seconds)."""
        return self._due

    def _tell(self, words: str) -> None:
        """Never waits: a manager that does not listen finds out by itself what it wants to know."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(words.encode(), self._address)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._due = float("inf")
