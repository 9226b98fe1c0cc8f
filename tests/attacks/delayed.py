"""`python delayed.py [bind=S] [close=S] [poll=S] [epoll=S] MODULE ARGUMENTS...`: runs a module with wider race
windows.

It pauses for S seconds after each bind(2) and connect(2) of a netlink socket, after each close(2) (of sockets and
other descriptors), or after each poll(2) or epoll_wait(2) that has found events. So an attack that needs a race
succeeds if it is possible.
"""

from __future__ import annotations

import os
import runpy
import select
import socket
import sys
import time
from typing import Any

_closing = os.close
_poll: Any = select.poll
_epoll: Any = select.epoll


def _slow_bind(seconds: float) -> None:
    class Slow(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            if self.family == socket.AF_NETLINK:
                time.sleep(seconds)

        def connect(self, address: Any) -> None:
            super().connect(address)
            if self.family == socket.AF_NETLINK:
                time.sleep(seconds)

    socket.socket = Slow  # type: ignore[misc]


def _slow_close(seconds: float) -> None:
    class Slow(socket.socket):
        def close(self) -> None:
            there = self.fileno() >= 0
            super().close()
            if there:
                time.sleep(seconds)

    def close(fd: int) -> None:
        _closing(fd)
        time.sleep(seconds)

    socket.socket = Slow  # type: ignore[misc]
    os.close = close


class _Slow:
    """A delayed poll or epoll object."""

    def __init__(self, real: Any, seconds: float) -> None:
        self._real, self._seconds = real, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def poll(self, *arguments: Any) -> Any:
        ready = self._real.poll(*arguments)
        if ready:
            time.sleep(self._seconds)
            ready = self._real.poll(0) or ready
        return ready


def _slow_poll(seconds: float) -> None:
    select.poll = lambda: _Slow(_poll(), seconds)  # type: ignore[assignment,misc,return-value]


def _slow_epoll(seconds: float) -> None:
    select.epoll = lambda: _Slow(_epoll(), seconds)  # type: ignore[assignment,misc]


_DELAYED = {"bind": _slow_bind, "close": _slow_close, "poll": _slow_poll, "epoll": _slow_epoll}


def main(arguments: list[str]) -> None:
    while arguments and "=" in arguments[0]:
        name, _, seconds = arguments.pop(0).partition("=")
        _DELAYED[name](float(seconds))
    module = arguments[0]
    sys.argv = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
