"""Sends messages between processes over AF_NETLINK, NETLINK_USERSOCK, with the sender's credentials from the kernel.

A portid identifies no process: it belongs to the holders of the socket that is bound to it *now*, and is free for any
uid as soon as the last descriptor of that socket is closed. So a link is a pair of sockets that one process makes, and
both sides keep both of them: see `pair`, and docs/protocol.md for the argument.

pyroute2 is not used: it drops the credentials that this protocol's safety depends on, and takes 7 to 15 times the
processor time per message (`make bench` measures it). The tests use it as the oracle for our frames. Source:
netlink(7), unix(7) for SCM_CREDENTIALS and SCM_RIGHTS, net/netlink/af_netlink.c.
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
    """One datagram and its sender as reported by the kernel: pid, real uid, the socket's portid."""

    data: bytes
    pid: int
    uid: int
    portid: int


class NetlinkSocket:
    """A NETLINK_USERSOCK datagram socket. Received packets carry their sender's credentials."""

    def __init__(self, portid: int = 0) -> None:
        """Binds to `portid`; 0: one chosen by the kernel. OSError EADDRINUSE if it is in use."""
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
        # The latest credentials: as they came, pid, uid. Most messages have the same sender. One tuple, for threads.
        self._seen: tuple[list[tuple[int, int, bytes]], int, int] = [], -1, -1
        self.closed = False

    @classmethod
    def given(cls, fd: int) -> NetlinkSocket:
        """Wraps a socket received from another process; takes over the descriptor, also on failure. OSError if it is
        something else."""
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
        """Sets the peer. From then on the kernel refuses messages from other portids before they take up buffer
        space."""
        self.socket.connect((portid, 0))
        self._peer = (portid, 0)

    def send(self, data: bytes, flags: int = _DONTWAIT) -> bool:
        """Sends to the peer without blocking. False if its buffer is full or the message too large; ConnectionError if
        its portid is free.

        The destination is passed each time, because a process with a copy of this socket can connect it elsewhere.
        Never waits for POLLOUT, which stays set while the *peer's* buffer is full.
        """
        try:
            self.socket.sendto(data, flags, self._peer)
        except ConnectionError:
            raise
        except OSError:  # EAGAIN; also ENOBUFS, EMSGSIZE
            return False
        return True

    def send_to(self, data: bytes, portid: int) -> bool:
        """Sends to any portid. For nothing secret: a portid identifies no process."""
        try:
            self.socket.sendto(data, _DONTWAIT, (portid, 0))
        except BlockingIOError:
            return False
        return True

    def receive(self, flags: int = _DONTWAIT) -> Packet | None:
        """Returns the next packet; None if there is none now. uid is -1 if it came without credentials.

        A packet that was too long is truncated; its nlmsg_len reveals that.
        """
        try:
            data, ancillary, got, address = self.socket.recvmsg(MAX_MESSAGE, _ANCILLARY, flags)
        except BlockingIOError:
            return None
        seen, pid, uid = self._seen
        if ancillary != seen or got & _NO_ROOM:
            pid, uid = self._credentials(ancillary, got)
        return tuple.__new__(Packet, (data, pid, uid, address[0]))  # as Packet(...), in half the time

    def _credentials(self, ancillary: list[tuple[int, int, bytes]], got: int) -> tuple[int, int]:
        """Returns pid and uid from the ancillary data of a message; -1, -1 if they do not say it."""
        if len(ancillary) == 1 and not got & _NO_ROOM:
            level, kind, value = ancillary[0]
            if kind == _SCM_CREDENTIALS and level == _SOL_SOCKET and len(value) == _UCRED.size:
                pid, uid, _ = _UCRED.unpack(value)
                self._seen = ancillary, pid, uid
                return pid, uid
        _close_pidfds(ancillary)
        return -1, -1

    def drain(self, most: int = 1024) -> None:
        """Reads and discards waiting packets, at most `most`."""
        for _ in range(most):
            if self.receive() is None:
                return

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def _close_pidfds(ancillary: list[tuple[int, int, bytes]]) -> None:
    """Closes pidfds that came with a message. On Linux 6.5 to 6.15 a peer with a copy of our socket can request one
    per message, by SO_PASSPIDFD instead of SO_PASSCRED."""
    for level, kind, value in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_PIDFD and len(value) == 4:
            with contextlib.suppress(OSError):
                os.close(struct.unpack("=i", value)[0])


def pair() -> tuple[NetlinkSocket, NetlinkSocket]:
    """Makes a link: returns the broker's end and the daemon's end, each bound, and connected to the other. OSError.

    While any process has a descriptor of an end, no other socket can bind its portid (EADDRINUSE), and only its peer
    can send to it (ECONNREFUSED). Messages that others sent between bind and connect are read and discarded; a message
    already in transit still carries its sender's credentials.
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
    """Binds to a random portid. The kernel would choose the pid, which a squatter could predict and bind first."""
    for _ in range(_BIND_TRIES):
        try:
            return NetlinkSocket(int.from_bytes(os.urandom(4), "little") or 1)  # `secrets` would cost a daemon 1 MB
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"{_BIND_TRIES} random portids are in use")


def give_pair(connection: socket.socket, message: bytes, ours: NetlinkSocket, theirs: NetlinkSocket) -> None:
    """Sends `message` and both ends to the peer of an AF_UNIX connection, without blocking. OSError."""
    socket.send_fds(connection, [message], [ours.fileno(), theirs.fileno()], _DONTWAIT)


def take_pair(connection: socket.socket) -> tuple[bytes, NetlinkSocket | None, NetlinkSocket | None]:
    """Receives what `give_pair` sent: (message, the broker's end, the daemon's end); None, None if there is only a
    message.

    ConnectionError if they are not the two ends of one link; OSError of recvmsg(2). Blocks as the connection does.
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
    """Returns whether `data` is exactly a HELO or QUIT (`kind`)."""
    return len(data) == HEADER.size and HEADER.unpack(data)[:2] == (HEADER.size, kind)
