"""AF_UNIX SOCK_SEQPACKET: how processes ask the broker, and how a user's commands reach that user's daemon.

Source: unix(7). The peer's credentials are those of connect(2) or listen(2), and not forgeable.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios
from pathlib import Path

from upcall.core.errors import UsageError
from upcall.wire.envelope import MAX_MESSAGE

_UCRED = struct.Struct("=iII")
_SO_PEERPIDFD = 77  # Linux 6.5
_SO_PASSRIGHTS = 83  # Linux 6.16
_MOST_QUEUED = (
    512  # messages of one connection; the kernel's limit (net.unix.max_dgram_qlen, the sender's buffer) is lower
)
_TIMEVAL = struct.Struct("@ll")
_FIVE_SECONDS, _NO_LIMIT = _TIMEVAL.pack(5, 0), _TIMEVAL.pack(0, 0)
_TRUNC = int(socket.MSG_TRUNC)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other side."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def pidfd_of(connection: socket.socket) -> int:
    """A pidfd of the process on the other side, as it was at connect(2). OSError if it has ended.

    Before Linux 6.5 it is of whoever has that pid now: what comes from it still has to have the peer's pid and uid.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return os.pidfd_open(peer_of(connection)[0])


def takes_no_rights(listener: socket.socket) -> bool:
    """Has the kernel refuse descriptors (SCM_RIGHTS) that are sent to this listener's connections. False before Linux
    6.16: then see `carries_rights` and `discard`.

    A descriptor that is dropped with a message is closed by the process that drops it, which waits for that: for a TCP
    socket that lingers as long as the sender likes.
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def unread_by_peer(connection: socket.socket) -> int:
    """Bytes, with the kernel's overhead, that we have sent and the peer has not read (SIOCOUTQ, unix(7))."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), "little", signed=True)


def carries_rights(connection: socket.socket) -> bool:
    """Whether the next message has descriptors. Only looks: what is looked at is not dropped."""
    try:
        flags = connection.recvmsg(1, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)[2]
    except OSError:
        return False
    return bool(flags & socket.MSG_CTRUNC)


def discard(connection: socket.socket) -> bool:
    """Closes a connection without waiting for what its peer has sent. False if there are descriptors in it: closing
    them may take as long as the peer likes, and must be done elsewhere."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # nothing is sent to us after this
        for _ in range(_MOST_QUEUED):
            if carries_rights(connection):
                return False
            if not connection.recv(1, socket.MSG_DONTWAIT):
                break
    connection.close()
    return True


def listens(path: Path) -> bool:
    """Whether a process listens at this socket. OSError if that cannot be known: no right, or nobody takes us."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def listen(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path`. One that nobody listens on any more is replaced; a live one is a UsageError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.setblocking(False)
    try:
        if path.is_socket():
            if listens(path):
                raise UsageError(f"{path}: somebody listens there already")
            path.unlink()
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path, owners: frozenset[int], wait: bool = True) -> socket.socket:
    """A connection to a listener that runs as one of `owners`. OSError if there is none, UsageError if not theirs.

    `wait`: for room in its backlog, 5 s at most. Otherwise a full one is a BlockingIOError; the connection does not
    block."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        # Blocking: while the backlog is full, connect(2) of a non-blocking socket fails at once (EAGAIN).
        if wait:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _FIVE_SECONDS)
        else:
            connection.setblocking(False)
        connection.connect(os.fspath(path))
        if wait:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_LIMIT)
            connection.settimeout(5)
        _, uid = peer_of(connection)
        if uid not in owners:
            raise UsageError(f"{path}: uid {uid} listens there, not one of {sorted(owners)}")
    except BaseException:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket) -> bytes | None:
    """The next datagram; empty at the end; None if there is none now. ConnectionError for a truncated one."""
    try:
        data, _, flags, _ = connection.recvmsg(MAX_MESSAGE)
    except BlockingIOError:
        return None
    if flags & _TRUNC:
        raise ConnectionError("a message longer than the protocol has")
    return data


def unlink_quietly(path: Path) -> None:
    """Takes a socket's name away; that it has gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
