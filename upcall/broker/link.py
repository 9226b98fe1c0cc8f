"""The broker's way to one daemon: what the daemon sends, and its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from upcall.broker.loop import URGENT
from upcall.kernel import ancestry
from upcall.kernel.netlink import NetlinkSocket, Packet
from upcall.registry import Association
from upcall.wire.netlink import HEADER, HELO, QUIT, RESPONSE, pack_control

if TYPE_CHECKING:
    from upcall.broker.server import Server

_JUNK_IN_A_ROW, _JUNK_PAUSE = 8, 0.02
_LAST_WORDS = 256


class _Pidfd:
    """Readable once the process has ended (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class DaemonLink:
    """The way to one daemon: a socket that only it can send to, and an eye on whether it lives."""

    def __init__(self, server: Server, uid: int, pid: int, portid: int) -> None:
        """OSError if the process or its socket is gone already."""
        self._server, self.uid, self.pid, self.portid = server, uid, pid, portid
        self.association: Association | None = None
        self._junk = 0  # useless messages in a row
        self._alive = _Pidfd(pid)
        try:
            self.began = ancestry.began(pid)
            self.socket = NetlinkSocket()
            self.socket.connect(portid)
        except OSError:
            self._alive.close()
            raise

    def start(self, association: Association) -> None:
        self.association = association
        if not self.socket.closed:  # it may have died while it was told what is pending
            self._server.loop.add(self.socket, self._on_readable, self._server.person_of(self.uid))
            self._server.loop.add(self._alive, self._on_exit, URGENT)

    def send(self, data: bytes) -> bool:
        return self.socket.send(data)

    def hello(self) -> bool:
        return self.socket.send(pack_control(HELO))

    def close(self) -> None:
        if self.socket.closed:
            return
        for source in (self.socket, self._alive):
            self._server.loop.remove(source)
            source.close()
        self._server.after_close(self.uid)

    def _on_exit(self) -> None:
        assert self.association is not None  # noqa: S101 - set before the loop knows us
        for _ in range(_LAST_WORDS):  # what it had answered before it ended still counts
            if self.socket.closed or (packet := self.socket.receive()) is None:
                break
            self._take(packet)
        self._server.log("daemon-exited", uid=self.uid, pid=self.pid)
        self._server.broker.gone(self.association)

    def _on_readable(self) -> None:
        """One message per turn: fair to everybody, and no second call only to learn that there is no more."""
        packet = self.socket.receive()
        if packet is None or self._take(packet):
            self._junk = 0
            return
        self._junk += 1
        if self._junk >= _JUNK_IN_A_ROW:
            self._junk = 0
            self._server.loop.mute(self.socket, self._server.now + _JUNK_PAUSE)

    def _take(self, packet: Packet) -> bool:
        """One message; False if it was of no use."""
        association, broker = self.association, self._server.broker
        assert association is not None  # noqa: S101 - set before the loop knows us
        data = packet.data
        kind = HEADER.unpack_from(data)[1] if len(data) >= HEADER.size else 0
        if packet.uid != self.uid or packet.pid != self.pid:
            # A child that inherited the socket, or one that was given it: it is not who registered.
            self._server.reject("uid" if packet.uid != self.uid else "pid", packet)
            return False
        if kind == RESPONSE:
            return broker.answered(association, data)
        if kind == QUIT and len(data) == HEADER.size:
            self._server.log("quit", uid=self.uid, pid=self.pid)
            broker.quit(association)
            return True
        if kind == HELO and len(data) == HEADER.size:
            return True
        self._server.reject("message", packet)
        return False
