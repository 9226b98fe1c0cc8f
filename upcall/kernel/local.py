"""AF_UNIX SOCK_SEQPACKET: how processes ask the broker, and how a user's commands reach that user's daemon.

Source: unix(7). The peer's credentials are those of connect(2) or listen(2), and not forgeable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path

from upcall.core.errors import UsageError
from upcall.wire.envelope import MAX_MESSAGE

_UCRED = struct.Struct("=iII")
_SO_PEERPIDFD = 77  # Linux 6.5
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
