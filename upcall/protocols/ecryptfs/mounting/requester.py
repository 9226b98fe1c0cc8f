"""Establishes which process asks for a mount, and that it has one user's rights and no others.

SO_PEERCRED is the effective uid and the pid of connect(2); the credentials of the message are the real uid and the pid
of the process that sent it. Both must agree, and all four uids and gids in /proc with them. So a set-user-ID program
cannot be used, in either direction, nor can a connection that was inherited by, or passed to, another process.
"""

from __future__ import annotations

import os
import re
import select
import socket
from typing import Final, NamedTuple

from upcall.kernel import libc, procfs, ucred
from upcall.kernel.local import pidfd_of
from upcall.protocols.ecryptfs.mounting.denied import NOT_PERMITTED, UNAVAILABLE, WRONG, Denied

_IDS: Final = re.compile(rb"^(?:Uid|Gid):\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)


class MountRequester(NamedTuple):
    """The process that asks. `pidfd`: holds it, so that its pid cannot become another's unnoticed."""

    pid: int
    uid: int
    gid: int
    pidfd: int


def requester_of(connection: socket.socket) -> MountRequester:
    """Returns the process that made the connection. Denied if it has ended."""
    peer = ucred.of_peer(connection)
    try:
        return MountRequester(*peer, pidfd_of(connection))
    except OSError:
        raise Denied(UNAVAILABLE, "the process that asked has ended") from None


def check(requester: MountRequester, sender: ucred.Credentials | None) -> None:
    """Denied unless `sender`, the credentials of a message, is the requester, and has the rights of one user only.
    Root is refused: it needs no help, and its mount namespace could be entered only with all of its capabilities.

    Before Linux 6.5 the pid might have been another's when the pidfd was opened: then these are that one's rights, and
    it runs since before the message was checked here."""
    if sender is None or (sender.pid, sender.uid) != (requester.pid, requester.uid):
        raise Denied(
            NOT_PERMITTED, "the request was sent by another process, or another user, than made the connection"
        )
    try:
        status = _status(requester)
    except OSError:
        raise Denied(UNAVAILABLE, "the process that asked has ended") from None
    ids = [tuple(map(int, match.groups())) for match in _IDS.finditer(status)]
    if ids != [(requester.uid,) * 4, (requester.gid,) * 4]:
        raise Denied(
            NOT_PERMITTED,
            "the process that asked runs with the rights of two users or groups (set-user-ID): run `upcall mount` by "
            "itself",
        )
    if requester.uid == 0:
        raise Denied(
            WRONG, "root mounts without help: by mount(8), with the options of `upcall key show`, and umount(8)"
        )
    if ended(requester):
        raise Denied(UNAVAILABLE, "the process that asked has ended")


def _status(requester: MountRequester) -> bytes:
    """Reads /proc/PID/status with the requester's own rights: another user could not, with hidepid (proc(5))."""
    uid, gid = os.geteuid(), os.getegid()
    libc.call("setfsgid", requester.gid)
    libc.call("setfsuid", requester.uid)
    try:
        return procfs.read(requester.pid, "status")
    finally:
        libc.call("setfsuid", uid)
        libc.call("setfsgid", gid)


def ended(requester: MountRequester) -> bool:
    """Returns whether the process has ended."""
    return bool(select.select([requester.pidfd], [], [], 0)[0])


def receive(
    connection: socket.socket, most: int, descriptors: int
) -> tuple[bytes, list[int], ucred.Credentials | None]:
    """Receives one message: its bytes, its descriptors, its sender. Blocks as long as the socket's time-out. OSError;
    Denied if it is longer than `most` bytes or has more than `descriptors`. SO_PASSCRED must be set."""
    room = ucred.SPACE + socket.CMSG_SPACE(4 * descriptors)
    data, ancillary, flags, _ = connection.recvmsg(most + 1, room, socket.MSG_CMSG_CLOEXEC)
    found: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % 4
            found += [int.from_bytes(content[at : at + 4], "little") for at in range(0, whole, 4)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > most:
        for fd in found:
            os.close(fd)
        raise Denied(WRONG, "the request is longer than one of `upcall mount`")
    return data, found, ucred.of_message(ancillary)
