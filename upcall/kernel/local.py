"""Connects processes by AF_UNIX SOCK_SEQPACKET sockets: requesters to the broker, a user's commands to the user's
daemon.

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
from upcall.kernel import ucred
from upcall.wire.envelope import MAX_MESSAGE

_SO_PEERPIDFD = 77  # Linux 6.5
_SO_PASSRIGHTS = 83  # Linux 6.16
_MOST_QUEUED = (
    512  # messages of one connection; the kernel's limit (net.unix.max_dgram_qlen, the sender's buffer) is lower
)
_TIMEVAL = struct.Struct("@ll")
_FIVE_SECONDS, _NO_LIMIT = _TIMEVAL.pack(5, 0), _TIMEVAL.pack(0, 0)


def pidfd_of(connection: socket.socket) -> int:
    """Returns a pidfd of the peer process, as of connect(2). OSError if it has ended.

    Before Linux 6.5 the pid may have been reused: messages must still be checked for the peer's pid and uid.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return os.pidfd_open(ucred.of_peer(connection).pid)


def takes_no_rights(listener: socket.socket) -> bool:
    """Makes the kernel refuse descriptors (SCM_RIGHTS) sent to this listener's connections. False before Linux 6.16:
    use `carries_rights` and `discard` then.

    A process that drops a message closes its descriptors, and waits for that: with a TCP socket that lingers, for as
    long as the sender likes.
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def unread_by_peer(connection: socket.socket) -> int:
    """Returns the bytes, with the kernel's overhead, sent and not yet read by the peer (SIOCOUTQ, unix(7))."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), "little", signed=True)


def carries_rights(connection: socket.socket) -> bool:
    """Returns whether the next message carries descriptors. The message stays in the queue."""
    try:
        flags = connection.recvmsg(1, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)[2]
    except OSError:
        return False
    return bool(flags & socket.MSG_CTRUNC)


def discard(connection: socket.socket) -> bool:
    """Closes a connection without blocking on what its peer has sent. False if that includes descriptors: closing them
    may take as long as the peer likes, and must be done in another thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # the peer can send nothing after this
        for _ in range(_MOST_QUEUED):
            if carries_rights(connection):
                return False
            if not connection.recv(1, socket.MSG_DONTWAIT):
                break
    connection.close()
    return True


def listens(path: Path) -> bool:
    """Returns whether a process listens at this socket, if only with a full backlog. OSError if unknown: no
    permission."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its backlog is full
            return True
    return True


def listen(path: Path, mode: int) -> socket.socket:
    """Returns a listening, non-blocking socket at `path`. A stale socket is replaced; UsageError if a process listens
    there. OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.setblocking(False)
    try:
        if path.is_socket():
            if listens(path):
                raise UsageError(f"{path}: another process listens there already: `upcall status` shows what runs")
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
    """Connects to a listener that runs as one of the uids `owners`. OSError if there is none; UsageError if another
    uid listens.

    `wait`: block for room in its backlog, 5 s at most. Otherwise BlockingIOError if it is full, and the connection is
    non-blocking.
    """
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
        uid = ucred.of_peer(connection).uid
        if uid not in owners:
            raise UsageError(f"{path}: uid {uid} listens there, not one of {sorted(owners)}")
    except BaseException:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket) -> bytes | None:
    """Returns the next datagram; empty at the end of file; None if there is none now. ConnectionError if it was
    truncated."""
    try:
        data = connection.recv(MAX_MESSAGE + 1)  # one byte more shows truncation, for less than recvmsg(2) costs
    except BlockingIOError:
        return None
    if len(data) > MAX_MESSAGE:
        raise ConnectionError("a message longer than the protocol has")
    return data


def unlink_quietly(path: Path) -> None:
    """Removes a socket's path; ignores that it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
