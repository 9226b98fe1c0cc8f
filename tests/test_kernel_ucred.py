"""The credentials of a connection's peer and of a message's sender."""

from __future__ import annotations

import os
import socket

from upcall.kernel import ucred

MINE = (os.getpid(), os.geteuid(), os.getegid())


def test_the_credentials_of_a_connections_peer_are_read() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        assert ucred.of_peer(one) == MINE


def test_the_credentials_of_a_messages_sender_are_read() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        other.send(b"x")
        _, ancillary, _, _ = one.recvmsg(1, ucred.SPACE)
        assert ucred.of_message(ancillary) == MINE


def test_a_message_without_credentials_has_no_sender() -> None:
    assert ucred.of_message([]) is None
    whole = ucred.UCRED.pack(1, 2, 3)
    assert ucred.of_message([(ucred.SOL_SOCKET, ucred.SCM_CREDENTIALS, whole[:-1])]) is None
    assert ucred.of_message([(ucred.SOL_SOCKET, socket.SCM_RIGHTS, whole)]) is None
