"""struct ucred: pid, uid and gid of a process, as the kernel vouches for them.

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
SCM_CREDENTIALS: Final = 2  # plain numbers: the socket module's enumerations cost a microsecond in each comparison
SOL_SOCKET: Final = int(socket.SOL_SOCKET)
SPACE: Final = socket.CMSG_SPACE(UCRED.size)  # for recvmsg(2): one of them and nothing else


class Credentials(NamedTuple):
    """struct ucred."""

    pid: int
    uid: int
    gid: int


def of_peer(connection: socket.socket) -> Credentials:
    """Of the process at the other end of an AF_UNIX connection, as it was at connect(2) or listen(2). OSError."""
    return Credentials._make(UCRED.unpack(connection.getsockopt(SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)))


def of_message(ancillary: Iterable[tuple[int, int, bytes]]) -> Credentials | None:
    """Of the sender of a message, from what recvmsg(2) gave; None if it came without."""
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_CREDENTIALS and len(data) == UCRED.size:
            return Credentials._make(UCRED.unpack(data))
    return None
