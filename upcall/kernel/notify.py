"""Notifies the service manager by sd_notify(3): ready, alive (watchdog), reloading, stopping.

Source: sd_notify(3), sd_watchdog_enabled(3), unix(7). Not a library: one datagram per message is the whole protocol,
and the processes should stay small.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final

_ADDRESS, _INTERVAL, _WHOSE = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_PER_INTERVAL: Final = 3  # watchdog messages per time-out of the manager


class Manager:
    """The service manager's notification socket. Without one, all messages are dropped, and `next_wake` is inf."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Removes the variables from the environment, so that child processes cannot send in this process's name."""
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
        """Reports that the process serves. `status`: for people."""
        self._tell(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Reports a status text for people."""
        self._tell(f"STATUS={status}")

    def reloading(self) -> None:
        """Reports a reload, until the next `ready`."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Reports that the process is ending."""
        self._tell("STOPPING=1")

    def alive(self, now: float, progress: Callable[[], bool] = lambda: True) -> None:
        """Feeds the watchdog if it is due and `progress()` is true; otherwise the manager's time-out kills the
        process. `now`: seconds of CLOCK_MONOTONIC."""
        if now >= self._due:
            self._due = now + self._every
            if progress():
                self._tell("WATCHDOG=1")

    def next_wake(self) -> float:
        """Returns when `alive` must be called at the latest, in seconds of CLOCK_MONOTONIC."""
        return self._due

    def _tell(self, words: str) -> None:
        """Sends a datagram without blocking; drops it if the manager does not read."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(words.encode(), self._address)

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._due = float("inf")
