"""Reads struct ucred: pid, uid and gid of a peer process, as reported by the kernel.

Source: unix(7), SO_PEERCRED and SCM_CREDENTIALS; netlink(7). Not forgeable without CAP_SETUID, CAP_SETGID and
CAP_SYS_ADMIN in the receiver's user namespace. The uid is the real one in messages, the effective one of connect(2) or
listen(2) in SO_PEERCRED.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

UCRED: Final = struct.Struct("=iII")
SCM_CREDENTIALS: Final = 2  # plain numbers: comparing the socket module's enumerations costs a microsecond
SOL_SOCKET: Final = int(socket.SOL_SOCKET)
SPACE: Final = socket.CMSG_SPACE(UCRED.size)  # bytes for recvmsg(2): room for exactly one


class Credentials(NamedTuple):
    """struct ucred."""

    pid: int
    uid: int
    gid: int


def of_peer(connection: socket.socket) -> Credentials:
    """Returns the credentials of the peer of an AF_UNIX connection, as of connect(2) or listen(2). OSError."""
    return Credentials._make(UCRED.unpack(connection.getsockopt(SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)))


def of_message(ancillary: Iterable[tuple[int, int, bytes]]) -> Credentials | None:
    """Returns the credentials of a message's sender, from recvmsg(2)'s ancillary data; None if there are none."""
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_CREDENTIALS and len(data) == UCRED.size:
            return Credentials._make(UCRED.unpack(data))
    return None
