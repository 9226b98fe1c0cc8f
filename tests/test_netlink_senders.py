"""The sender of a message is what its credentials say, whatever was remembered of messages before."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from upcall.kernel import ucred
from upcall.kernel.netlink import NetlinkSocket, Packet, pair
from upcall.testing.processes import in_child

Ancillary = list[tuple[int, int, bytes]]
TRUNCATED = int(socket.MSG_CTRUNC)
few = st.sampled_from([0, 1, 1000])
levels = st.sampled_from([ucred.SOL_SOCKET, 270])
kinds = st.sampled_from([ucred.SCM_CREDENTIALS, 1])
values = st.builds(lambda *ids: struct.pack("=iII", *ids), few, few, few) | st.binary(max_size=13)
ancillaries = st.lists(st.tuples(levels, kinds, values), max_size=2)
messages = st.tuples(ancillaries, st.sampled_from([0, TRUNCATED, 1]), few)


class Played:
    """A socket that has received these messages."""

    def __init__(self, messages: list[tuple[Ancillary, int, int]]) -> None:
        self._messages = list(messages)

    def getsockname(self) -> tuple[int, int]:
        return 5, 0

    def getpeername(self) -> tuple[int, int]:
        return 6, 0

    def recvmsg(self, *_: int) -> tuple[bytes, Ancillary, int, tuple[int, int]]:
        ancillary, flags, portid = self._messages.pop(0)
        return b"data", [*ancillary], flags, (portid, 0)


def sender(ancillary: Ancillary, flags: int) -> tuple[int, int]:
    """As if each message were the first."""
    if len(ancillary) == 1 and not flags & TRUNCATED:
        level, kind, value = ancillary[0]
        if (level, kind, len(value)) == (ucred.SOL_SOCKET, ucred.SCM_CREDENTIALS, 12):
            pid, uid, _ = struct.unpack("=iII", value)
            return pid, uid
    return -1, -1


@given(st.lists(messages, max_size=8))
def test_each_message_has_the_sender_that_its_own_credentials_name(received: list[Any]) -> None:
    made = NetlinkSocket.__new__(NetlinkSocket)
    made._adopt(Played(received))  # type: ignore[arg-type]
    for ancillary, flags, portid in received:
        packet = made.receive()
        assert packet == Packet(b"data", *sender(ancillary, flags), portid)
        assert type(packet) is Packet


def test_messages_of_two_processes_over_one_link_have_their_own_senders() -> None:
    ours, theirs = pair()
    for _ in range(3):
        theirs.send(b"parent")
        in_child(lambda: theirs.send(b"child"))
        for data, here in ((b"parent", True), (b"child", False)):
            packet = ours.receive()
            assert packet is not None
            assert (packet.data, packet.pid == os.getpid()) == (data, here)
    ours.close()
    theirs.close()
