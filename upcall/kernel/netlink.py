"""AF_NETLINK, NETLINK_USERSOCK: one process to another, with credentials that the kernel vouches for.

A portid identifies no process: it belongs to the holders of the socket that is bound to it *now*, and is free for any
uid as soon as the last descriptor of that socket is closed. So a link is a pair of sockets that one process makes, and
both sides keep both of them: see `pair`, and docs/protocol.md for the argument.

pyroute2 is not used here: it drops the credentials that this protocol's safety rests on and costs 7 to 15 times
the processor time per message (`make bench` measures it); the tests use it as the oracle for our frames.
Source: netlink(7), unix(7) for SCM_CREDENTIALS and SCM_RIGHTS, net/netlink/af_netlink.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import NamedTuple

from upcall.kernel import ucred
from upcall.wire.envelope import HEADER, MAX_MESSAGE

NETLINK_USERSOCK = 2
_SCM_PIDFD = 4

# Plain numbers: the socket module's are enumerations, whose arithmetic costs a microsecond per message.
_NO_ROOM = int(socket.MSG_CTRUNC)
_DONTWAIT = int(socket.MSG_DONTWAIT)
# Names of this module: an attribute look-up costs on the hot path.
_SOL_SOCKET, _SCM_CREDENTIALS, _UCRED, _ANCILLARY = ucred.SOL_SOCKET, ucred.SCM_CREDENTIALS, ucred.UCRED, ucred.SPACE
_BIND_TRIES = 64


class Packet(NamedTuple):
    """One datagram, and who the kernel says sent it: its pid, its real uid, the socket's portid."""

    data: bytes
    pid: int
    uid: int
    portid: int


class NetlinkSocket:
    """A datagram socket of the user-to-user family. Every packet taken from it carries credentials."""

    def __init__(self, portid: int = 0) -> None:
        """Binds to `portid`, or to one that the kernel chooses. OSError EADDRINUSE if it is in use."""
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_USERSOCK)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            made.bind((portid, 0))
        except OSError:
            made.close()
            raise
        self._adopt(made)

    def _adopt(self, made: socket.socket) -> None:
        self.socket = made
        self.portid: int = made.getsockname()[0]
        self._peer: tuple[int, int] = (made.getpeername()[0], 0)
        self.closed = False

    @classmethod
    def given(cls, fd: int) -> NetlinkSocket:
        """One that another process has made and given to us; the descriptor is ours from now on, also on failure.
        OSError if it is something else."""
        try:
            given = socket.socket(fileno=fd)
        except OSError:
            with contextlib.suppress(OSError):  # not a socket
                os.close(fd)
            raise
        if (given.family, given.type, given.proto) != (socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_USERSOCK):
            given.close()
            raise OSError(errno.EPROTOTYPE, "not a NETLINK_USERSOCK socket")
        self = cls.__new__(cls)
        self._adopt(given)
        return self

    @property
    def peer(self) -> int:
        """The portid that `send` sends to; 0: none."""
        return self._peer[0]

    def fileno(self) -> int:
        return self.socket.fileno()

    def connect(self, portid: int) -> None:
        """From now on the kernel refuses messages from any other portid, before they take up any room."""
        self.socket.connect((portid, 0))
        self._peer = (portid, 0)

    def send(self, data: bytes, flags: int = _DONTWAIT) -> bool:
        """To the peer. False if it takes no more now, or not this; ConnectionError if its portid is free.

        The destination is named each time: whoever has a copy of this socket can connect it to somebody else. Never
        waits for POLLOUT, which stays set while the *peer's* buffer is full.
        """
        try:
            self.socket.sendto(data, flags, self._peer)
        except ConnectionError:
            raise
        except OSError:  # EAGAIN, and what memory or size can make of it: ENOBUFS, EMSGSIZE
            return False
        return True

    def send_to(self, data: bytes, portid: int) -> bool:
        """The same, to any portid. Never anything secret: a portid is nobody's identity."""
        try:
            self.socket.sendto(data, _DONTWAIT, (portid, 0))
        except BlockingIOError:
            return False
        return True

    def receive(self, flags: int = _DONTWAIT) -> Packet | None:
        """The next packet; None if there is none now. What came without credentials has uid -1.

        One that was too long is cut short, as its nlmsg_len then tells.
        """
        try:
            data, ancillary, got, address = self.socket.recvmsg(MAX_MESSAGE, _ANCILLARY, flags)
        except BlockingIOError:
            return None
        pid = uid = -1
        if len(ancillary) == 1 and not got & _NO_ROOM:
            level, kind, value = ancillary[0]
            if kind == _SCM_CREDENTIALS and level == _SOL_SOCKET and len(value) == _UCRED.size:
                pid, uid, _ = _UCRED.unpack(value)
                return Packet(data, pid, uid, address[0])
        _close_pidfds(ancillary)
        return Packet(data, pid, uid, address[0])

    def drain(self, most: int = 1024) -> None:
        """Reads and forgets what is there."""
        for _ in range(most):
            if self.receive() is None:
                return

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def _close_pidfds(ancillary: list[tuple[int, int, bytes]]) -> None:
    """A peer with a copy of our socket can have Linux 6.5 to 6.15 put a pidfd into our table with each message, by
    SO_PASSPIDFD in the place of SO_PASSCRED."""
    for level, kind, value in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_PIDFD and len(value) == 4:
            with contextlib.suppress(OSError):
                os.close(struct.unpack("=i", value)[0])


def pair() -> tuple[NetlinkSocket, NetlinkSocket]:
    """The broker's end and the daemon's end of a link: each bound, and connected to the other. OSError.

    As long as one process has a descriptor of either, nobody can bind its portid (EADDRINUSE), and nobody but its peer
    can send to it (ECONNREFUSED). What others have sent between bind and connect is read and forgotten; one that was
    under way still has its sender's credentials.
    """
    ends = []
    try:
        for _ in range(2):
            ends.append(_somewhere())
        ours, theirs = ends
        ours.connect(theirs.portid)
        theirs.connect(ours.portid)
        ours.drain()
        theirs.drain()
    except OSError:
        for end in ends:
            end.close()
        raise
    return ours, theirs


def _somewhere() -> NetlinkSocket:
    """On a portid that nobody could foresee: the kernel would choose our pid, where others can wait for it."""
    for _ in range(_BIND_TRIES):
        try:
            return NetlinkSocket(int.from_bytes(os.urandom(4), "little") or 1)  # `secrets` would cost a daemon 1 MB
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"{_BIND_TRIES} random portids are in use")


def give_pair(connection: socket.socket, message: bytes, ours: NetlinkSocket, theirs: NetlinkSocket) -> None:
    """`message` and both ends over an AF_UNIX connection, without waiting; the process at its other end is who gets
    them. OSError."""
    socket.send_fds(connection, [message], [ours.fileno(), theirs.fileno()], _DONTWAIT)


def take_pair(connection: socket.socket) -> tuple[bytes, NetlinkSocket | None, NetlinkSocket | None]:
    """What `give_pair` gave: (message, the broker's end, the daemon's end); None, None if there is only a message.

    ConnectionError if both are not the two ends of one link; OSError as of recvmsg(2), for which it waits as the
    connection says.
    """
    message, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE, 2, int(socket.MSG_CMSG_CLOEXEC))
    ends: list[NetlinkSocket] = []
    try:
        for at, fd in enumerate(fds):
            try:
                ends.append(NetlinkSocket.given(fd))
            except OSError:
                for other in fds[at + 1 :]:
                    os.close(other)
                raise
        if not fds and not flags & _NO_ROOM:
            return message, None, None
        if len(ends) != 2 or flags & _NO_ROOM:
            raise ConnectionError(f"{len(ends)} descriptors came, 2 are needed")
        theirs, mine = ends
        if (theirs.peer, mine.peer) != (mine.portid, theirs.portid):
            raise ConnectionError("the two sockets are not connected to each other")
    except OSError as error:
        for end in ends:
            end.close()
        if isinstance(error, ConnectionError):
            raise
        raise ConnectionError(f"what came with HELO is not a link: {error.strerror}") from error
    return message, theirs, mine


def is_control(data: bytes, kind: int) -> bool:
    """Whether this is a HELO or a QUIT, whole."""
    return len(data) == HEADER.size and HEADER.unpack(data)[:2] == (HEADER.size, kind)
