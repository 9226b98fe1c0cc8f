"""Fuzzes registration.sock and the broker's end of a link: messages of a daemon, and of processes with copies of its
end.

Never raises. Only a complete HELO of the process that requested the link registers it. No message of another process,
or before HELO, reaches the broker's core. A connection gets at most one link.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from fuzz.target import holds, same
from upcall.broker.daemon_link import DaemonLink
from upcall.broker.registration import DaemonConnection, Registration
from upcall.core.messages import Answer
from upcall.kernel.netlink import Packet
from upcall.wire.envelope import HELO, QUIT, pack_control, pack_response

_PID, _UID = 1, 0  # an existing process, with its real uid
SEEDS = [
    b"\x00" + pack_control(HELO),
    b"\x00" + pack_control(HELO) + b"\x00" + pack_control(QUIT),
    b"\x01" + pack_control(HELO) + b"\x02" + pack_control(HELO),
    b"\x00" + pack_control(HELO) + b"\x00" + pack_response(1, 2, Answer(b"")),
    b"\x04" + pack_control(HELO) + b"\x04" + pack_control(HELO),
]


class _Core:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def refuses(self, uid: int) -> str:
        return ""

    def helo(self, *_: object) -> object:
        self.heard.append("helo")
        return self

    def answered(self, association: object, data: bytes) -> bool:
        same(association, self)
        self.heard.append("answer")
        return False

    def quit(self, association: object) -> None:
        same(association, self)
        self.heard.append("quit")


class _Loop:
    now = 0.0


def _log(event: str, **fields: object) -> None:
    same(event.isprintable(), True)


class _Socket:
    closed, portid = False, 7

    def send(self, data: bytes) -> bool:
        return True


class _Registration(Registration):
    def __init__(self, router: _Core) -> None:
        self.loop, self.router, self.log = cast(Any, _Loop()), cast(Any, router), cast(Any, _log)
        self._junk = Counter[str]()
        self.links = 0

    def offer(self, connection: DaemonConnection) -> None:
        self.links += 1
        connection.link = object.__new__(DaemonLink)


class _Connection(DaemonConnection):
    """A connection without a socket."""

    def __init__(self, listener: _Registration) -> None:
        self._registration = listener
        self.link, self.uid, self.pid, self.open = None, _UID, _PID, True

    def close(self) -> None:
        self.open = False


def run(data: bytes) -> None:
    router = _Core()
    registration = _Registration(router)
    connection = _Connection(registration)
    link = object.__new__(DaemonLink)
    link._registration, link._connection, link.association = registration, connection, None
    link._loop, link._router, link._log = registration.loop, registration.router, registration.log
    link.uid, link.pid, link.began, link._junk = _UID, _PID, 0, 0
    link.socket = link._far = cast(Any, _Socket())
    while data:
        kind, message, data = data[0], data[1:17], data[17:]
        heard = len(router.heard)
        if kind & 4:
            if connection.open:
                connection._take(message)
            holds(registration.links <= 1, "more than one link")
            same(len(router.heard), heard)
            continue
        uid, pid = _UID + (kind & 1), _PID + (kind >> 1 & 1)
        link._take(Packet(message, pid, uid, 9))
        if (uid, pid) != (_UID, _PID):
            same(len(router.heard), heard)
    same(router.heard.count("helo"), int(link.association is not None))
    holds(not router.heard or router.heard[0] == "helo", "heard before it was registered")
