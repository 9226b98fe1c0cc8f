"""Connects the daemon to one broker: the connection for registering, and the netlink link that it receives there.

Both ends of the link are kept open (docs/protocol.md). So neither portid can be taken by a squatter while this process
lives, even if the broker has ended; an answer to a broker that has ended stays in a queue that only the daemon reads.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import NamedTuple

from upcall.core.errors import PeerError, Refused
from upcall.core.messages import Refusal
from upcall.kernel import ucred
from upcall.kernel.local import connect
from upcall.kernel.netlink import Packet, is_control, take_pair
from upcall.process.paths import Place
from upcall.wire.envelope import HELO, MAX_MESSAGE, QUIT, pack_control, take_response

_SEND_TIMEOUT = struct.pack("@ll", 1, 0)  # struct timeval: 1 s, the time-out for room in the broker's queue


class Sender(NamedTuple):
    """The credentials of a packet's sender, as the kernel reports them."""

    pid: int
    uid: int
    portid: int


class BrokerLink:
    """A link to one broker. `socket` is the daemon's end of it.

    The socket is never closed explicitly: another thread may be about to send, and the number of a closed descriptor
    is reused at once. Each thread that uses it holds a reference; it is closed with the last one.
    """

    def __init__(self, place: Place) -> None:
        """Connects and requests a link. Call `take` next, then `greet`. OSError, UsageError."""
        self.connection = connect(place.registration_socket, place.owners())
        self.broker_pid, self._uid, _ = ucred.of_peer(self.connection)
        self.connection.send(pack_control(HELO))

    def take(self, timeout: float) -> None:
        """Receives the requested link. `timeout`: seconds. TimeoutError, OSError, Refused."""
        self.connection.settimeout(timeout)
        message, far, mine = take_pair(self.connection)
        if mine is None or far is None:
            raise _refused(message)
        self.socket, self._far = mine, far
        self.sender = Sender(self.broker_pid, self._uid, far.portid)
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)

    def greet(self, timeout: float) -> bool:
        """Sends HELO on the link, upon which the broker registers this daemon and ends an older one. Returns whether
        it replies with HELO within `timeout` seconds. OSError if it has closed the link; Refused gives its reason."""
        deadline = time.monotonic() + timeout
        self.socket.send(pack_control(HELO))
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self.connection, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = [fd for fd, _ in poll.poll(left * 1000)]
            if self.socket.fileno() in ready:
                packet = self.socket.receive()
                if packet is not None and packet[1:] == self.sender and is_control(packet.data, HELO):
                    self.connection.setblocking(False)
                    return True
            elif ready:
                raise _refused(self.connection.recv(MAX_MESSAGE))
        return False

    @property
    def portid(self) -> int:
        return self.socket.portid

    def receive(self) -> Packet | None:
        """Blocks until a message arrives; the caller must check its sender. None after a signal. OSError."""
        return self.socket.receive(0)

    def waiting(self) -> bool:
        """Returns whether a message waits in the socket's queue."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, data: bytes) -> bool:
        """Sends to the broker; blocks at most 1 second. False if its queue is full. ConnectionError."""
        return self.socket.send(data, 0)

    def wake(self) -> bool:
        """Makes one thread return from `receive`, by a message to this process; False if the queue is full."""
        return self._far.send(pack_control(HELO))

    def told(self) -> str:
        """Reads the connection without blocking: "quit" if the broker has sent QUIT, "gone" if it has ended or closed
        the connection, otherwise ""."""
        try:
            data = self.connection.recv(64)
        except BlockingIOError:
            return ""
        except OSError:
            return "gone"
        if is_control(data, QUIT):
            return "quit"
        return "" if data else "gone"

    def __del__(self) -> None:
        for end in (getattr(self, "socket", None), getattr(self, "_far", None), getattr(self, "connection", None)):
            if end is not None:
                end.close()


def _refused(message: bytes) -> Exception:
    """Returns the broker's reason for refusing a link."""
    if not message:
        return ConnectionError("the broker has closed the connection")
    try:
        outcome = take_response(message).outcome
    except PeerError as error:
        return ConnectionError(f"the broker talks nonsense: {error}")
    if isinstance(outcome, Refusal):
        return Refused(outcome.reason, outcome.errno)
    return ConnectionError("the broker has sent an answer, not a link")
