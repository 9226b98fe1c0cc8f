"""AF_NETLINK, NETLINK_USERSOCK: one process to another, with credentials that the kernel vouches for.

pyroute2 is not used here: it drops the credentials that this protocol's safety rests on and costs 7 to 15 times
the processor time per message (`make bench` measures it); the tests use it as the oracle for our frames.
Source: netlink(7), unix(7) for SCM_CREDENTIALS, net/netlink/af_netlink.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from upcall.wire.netlink import MAX_MESSAGE

NETLINK_USERSOCK = 2
SCM_CREDENTIALS = 2

# Documented: where daemons find the system's broker. Above any pid, so that no tool lands there by chance.
SYSTEM_PORTID = 0x75706300

_UCRED = struct.Struct("=iII")
_ANCILLARY = socket.CMSG_SPACE(_UCRED.size)
# Plain numbers: the socket module's are enumerations, whose arithmetic costs a microsecond per message.
_NO_ROOM = int(socket.MSG_CTRUNC)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_SOL_SOCKET = int(socket.SOL_SOCKET)


class Packet(NamedTuple):
    """One datagram, and who the kernel says sent it: its pid, its real uid, the socket's portid."""

    data: bytes
    pid: int
    uid: int
    portid: int


class NetlinkSocket:
    """A datagram socket of the user-to-user family. Every packet taken from it carries credentials."""

    def __init__(self, portid: int = 0) -> None:
        """Binds to `portid`, or to one that the kernel chooses. OSError EADDRINUSE if somebody sits there."""
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_USERSOCK)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self.socket.bind((portid, 0))
        except OSError:
            self.socket.close()
            raise
        self.portid: int = self.socket.getsockname()[0]
        self.closed = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def connect(self, portid: int) -> None:
        """From now on the kernel refuses whatever comes from another portid, before it takes up any room."""
        self.socket.connect((portid, 0))

    def disconnect(self) -> None:
        """Anybody may send again (connect(2) with AF_UNSPEC, which Python's connect cannot say)."""
        address = struct.pack("=HHII", socket.AF_UNSPEC, 0, 0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.connect(self.fileno(), address, len(address)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def send(self, data: bytes) -> bool:
        """To the connected peer. False if it takes no more now, or not this; ConnectionError if it is gone.

        Never waits for POLLOUT: it stays set while the *peer's* buffer is full.
        """
        try:
            self.socket.send(data, _DONTWAIT)
        except ConnectionError:
            raise
        except OSError:  # EAGAIN, and what memory or size can make of it: ENOBUFS, EMSGSIZE
            return False
        return True

    def send_to(self, data: bytes, portid: int) -> bool:
        """The same, to any portid."""
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
            if kind == SCM_CREDENTIALS and level == _SOL_SOCKET and len(value) == _UCRED.size:
                pid, uid, _ = _UCRED.unpack(value)
        return Packet(data, pid, uid, address[0])

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def bound_to(portid: int) -> str:
    """Who sits on a portid, for people: "pid 4711 (name), uid 1000", as far as can be seen."""
    try:
        rows = Path("/proc/net/netlink").read_text("ascii").splitlines()[1:]
    except OSError:
        return "somebody"
    fields = next((r.split() for r in rows if r.split()[1:3] == [str(NETLINK_USERSOCK), str(portid)]), None)
    if fields is None:
        return "somebody in another network namespace, or gone by now"
    inode = f"socket:[{fields[-1]}]"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) == inode for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text("utf-8", "replace").strip()
                return f"pid {process.name} ({name!r}), uid {process.stat().st_uid}"
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.ENOENT, errno.ESRCH, errno.EPERM):
                raise
    return "a process that we may not look into"
