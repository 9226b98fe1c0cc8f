"""Connects the broker to one daemon by a pair of netlink sockets; detects when the daemon's process ends."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from upcall.core.registry import Association
from upcall.kernel import procfs
from upcall.kernel.local import pidfd_of
from upcall.kernel.netlink import NetlinkSocket, Packet, pair
from upcall.process.loop import URGENT
from upcall.wire.envelope import HEADER, HELO, QUIT, RESPONSE, pack_control, pack_response, refusal

if TYPE_CHECKING:
    from upcall.broker.registration import DaemonConnection, Registration

_CONTROL = HEADER.size  # bytes of HELO and QUIT
_HELO, _QUIT, _RESPONSE = (struct.pack("=H", kind) for kind in (HELO, QUIT, RESPONSE))  # nlmsg_type, after nlmsg_len
_JUNK_IN_A_ROW, _JUNK_PAUSE = 8, 0.02  # useless messages until the link is muted; seconds
_LAST_WORDS, _AT_ONCE = 256, 8  # messages read after the process has ended, in all and per turn


class _Pidfd:
    """Readable once the process has ended (pidfd_open(2))."""

    def __init__(self, connection: socket.socket) -> None:
        self._fd = pidfd_of(connection)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class DaemonLink:
    """A pair of netlink sockets, made by the broker and shared with the daemon. Implements core.registry.Link.

    The broker keeps both ends open until the link is closed. So no squatter can take a portid while broker or daemon
    live, and requests to a daemon that has died stay in a queue that only the broker can read.
    """

    def __init__(self, registration: Registration, connection: DaemonConnection) -> None:
        """Makes the link and listens for HELO on it. OSError if the process has ended, or no descriptor is free."""
        self._registration, self._connection = registration, connection
        self._loop, self._router, self._log = registration.loop, registration.router, registration.log
        self.uid, self.pid = connection.uid, connection.pid
        self.association: Association | None = None
        self._junk = 0  # useless messages in a row
        self._ending, self._last_words = False, _LAST_WORDS
        self._alive = _Pidfd(connection.socket)
        try:
            self.began = procfs.started_at(self.pid)
            self.socket, self._far = pair()
        except OSError:
            self._alive.close()
            raise
        self._loop.add(self.socket, self._on_readable, connection.person)
        self._loop.add(self._alive, self._ended, URGENT)

    @property
    def ends(self) -> tuple[NetlinkSocket, NetlinkSocket]:
        """(the broker's, the daemon's)"""
        return self.socket, self._far

    @property
    def portid(self) -> int:
        """The daemon's netlink address; for people."""
        return self._far.portid

    def send(self, data: bytes) -> bool:
        """Sends one message without blocking. False if the daemon's buffer is full, or its sends were too slow lately.
        ConnectionError if its portid is free."""
        if len(data) == _CONTROL:
            # Send QUIT on the connection, too. The daemon's main thread reads it there before the end of file; on
            # the link, a worker may have received it and not handled it yet.
            self._connection.tell(data)
        loop, person = self._loop, self._connection.person
        if loop.pays(person):
            return self.socket.send(data)
        # Called for another person, or for the kernel. The daemon can make the send slow, so its person is charged.
        return not loop.charged(person) and loop.measured(person, self.socket.send, data)

    def connection_closed(self) -> None:
        """Handles the end of the daemon's connection. Answers that it sent before are still accepted."""
        if not self.socket.closed:
            self._ended()

    def close(self) -> None:
        """Closes the pair and the connection. May be repeated."""
        if self.socket.closed:
            return
        for source in (self.socket, self._alive):
            self._loop.remove(source)
            source.close()
        self._far.close()
        self._connection.close()

    def _ended(self) -> None:
        """Handles the end of the process or of its connection: reads what it sent before, charged to its person."""
        if self.association is None:
            self.close()
        elif not self._ending:
            self._ending = True
            self._loop.remove(self._alive)
            self._read_last_words()

    def _read_last_words(self) -> None:
        for _ in range(_AT_ONCE):
            packet = None if self.socket.closed or self._last_words <= 0 else self.socket.receive()
            if packet is None:
                if not self.socket.closed and self.association is not None:
                    self._log("daemon-exited", uid=self.uid, pid=self.pid)
                    self._router.gone(self.association)
                return
            self._last_words -= 1
            self._take(packet)
        self._loop.defer(self._connection.person, self._read_last_words)

    def _on_readable(self) -> None:
        """Receives one message per turn of the loop: fair, and saves the system call that would return EAGAIN."""
        packet = self.socket.receive()
        if packet is None or self._take(packet):
            self._junk = 0
            return
        self._junk += 1
        if self._junk >= _JUNK_IN_A_ROW:
            self._junk = 0
            self._loop.mute(self.socket, self._loop.now + _JUNK_PAUSE)

    def _take(self, packet: Packet) -> bool:
        """Handles one message. False if it was rejected."""
        data, pid, uid, _ = packet
        if uid != self.uid or pid != self.pid:
            # The sender inherited the sockets or was given them; it is not the process that requested the link.
            # A daemon in another pid namespace is rejected here, too: AF_UNIX translates pids, netlink does not.
            self._registration.reject("uid" if uid != self.uid else "pid", self.uid, self.pid, uid, pid)
            return False
        kind = data[4:6] if len(data) >= _CONTROL else b""
        if self.association is None:
            return self._register(kind == _HELO and len(data) == _CONTROL)
        if kind == _RESPONSE:
            return self._router.answered(self.association, data)
        if kind == _QUIT and len(data) == _CONTROL:
            self._log("daemon-quit", uid=self.uid, pid=self.pid)
            self._router.quit(self.association)
            return True
        if kind == _HELO and len(data) == _CONTROL:
            return True
        self._registration.reject("message", self.uid, self.pid)
        return False

    def _register(self, hello: bool) -> bool:
        """Handles the first message on the link: registers the process that requested it, or closes the link."""
        if not hello or procfs.real_uid(self.pid) != self.uid:
            self._registration.reject("pid" if hello else "message", self.uid, self.pid)
            return False
        if why := self._router.refuses(self.uid):  # the limits were reached meanwhile
            self._registration.refused(self._connection, why)
            self._connection.tell(pack_response(0, 0, refusal(why)))
            self.close()
            return False
        try:
            heard = self.socket.send(pack_control(HELO))
        except ConnectionError:
            heard = False
        if not heard:
            self._log("registration-failed", uid=self.uid, pid=self.pid, why="its socket buffer is full or closed")
            self.close()
            return False
        self._log("daemon-registered", uid=self.uid, pid=self.pid)
        # The HELO is sent before: Router.helo sends pending requests, and may find that the daemon has gone.
        self.association = self._router.helo(self.uid, self.pid, self.portid, self, self._loop.now, self.began)
        return True
