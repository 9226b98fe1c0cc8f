"""The daemon's way to one broker: the connection over which it registers, and the netlink link that it is given there.

Both ends of the link are kept (docs/protocol.md): while this process lives, neither portid is free for others, whether
the broker lives or not; an answer to a broker that has ended goes into a queue that only we can read.
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

_SEND_TIMEOUT = struct.pack("@ll", 1, 0)  # struct timeval: an answer waits so long for room in the broker's queue


class Sender(NamedTuple):
    """As the kernel names the sender of a packet."""

    pid: int
    uid: int
    portid: int


class BrokerLink:
    """A link to one broker. `socket` is our end.

    It is never closed explicitly: a thread may be about to send, and the number of a closed descriptor is reused at
    once. Each thread that receives from it or answers on it holds a reference; the last one that lets go closes it.
    """

    def __init__(self, place: Place) -> None:
        """Connects and asks for a link; `take` has to follow. OSError, UsageError."""
        self.connection = connect(place.registration_socket, place.owners())
        self.broker_pid, self._uid, _ = ucred.of_peer(self.connection)
        self.connection.send(pack_control(HELO))

    def take(self, timeout: float) -> None:
        """Takes the link that was asked for, and says HELO on it. TimeoutError, OSError, Refused."""
        self.connection.settimeout(timeout)
        message, far, mine = take_pair(self.connection)
        if mine is None or far is None:
            raise _refused(message)
        self.socket, self._far = mine, far
        self.sender = Sender(self.broker_pid, self._uid, far.portid)
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        self.socket.send(pack_control(HELO))

    def heard(self, timeout: float) -> bool:
        """Whether the broker says HELO on the link within `timeout` seconds: we are registered then. ConnectionError
        if it has closed the connection, Refused if it says why."""
        deadline = time.monotonic() + timeout
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
        """Blocks for the next message, of whomever. None after a signal or the like. OSError."""
        return self.socket.receive(0)

    def waiting(self) -> bool:
        """Whether a message is there that no thread has taken."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, data: bytes) -> bool:
        """To the broker; waits at most a second for room. False if there is none. ConnectionError."""
        return self.socket.send(data, 0)

    def wake(self) -> bool:
        """Has one thread return from `receive`, with a message of our own; False if others are to be read first."""
        return self._far.send(pack_control(HELO))

    def told(self) -> str:
        """What the broker has said on the connection: "quit" if we are not needed any more, "gone" if it has ended or
        closed it, or ""."""
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
    """Why there is no link, as the broker says it."""
    if not message:
        return ConnectionError("the broker has closed the connection")
    try:
        outcome = take_response(message).outcome
    except PeerError as error:
        return ConnectionError(f"the broker talks nonsense: {error}")
    if isinstance(outcome, Refusal):
        return Refused(outcome.reason, outcome.errno)
    return ConnectionError("the broker has sent an answer, not a link")
