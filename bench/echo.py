"""A process that answers every REQUEST with an empty answer: with our netlink code, or with pyroute2's.

python -m bench.echo upcall|pyroute2 FOLDER
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from upcall.kernel.netlink import NETLINK_USERSOCK, NetlinkSocket
from upcall.messages import Answer
from upcall.runtime import Place
from upcall.wire.netlink import HELO, REQUEST, RESPONSE, VERSION, pack_control, pack_response, take_request


def with_upcall(portid: int) -> None:
    """Credentials and all lengths checked, as the daemon does it."""
    mine = NetlinkSocket()
    mine.send_to(pack_control(HELO), portid)
    first = mine.receive(0)
    if first is None:
        raise SystemExit("no HELO came")
    mine.connect(first.portid)
    sender = first[1:]
    while True:
        packet = mine.receive(0)
        if packet is None or packet[1:] != sender:
            continue
        envelope = take_request(packet.data)
        mine.socket.send(pack_response(envelope.seq, envelope.index, Answer(b"")))


def with_pyroute2(portid: int) -> None:
    """The way it is meant: classes with fields, `get` to decode, `encode` to encode.

    Who sent a message cannot be checked; the registration goes around pyroute2, which does not say either.
    """
    from pyroute2.netlink import nlmsg  # type: ignore[import-untyped]
    from pyroute2.netlink.nlsocket import NetlinkSocket as TheirSocket  # type: ignore[import-untyped]

    envelope = (("index", "I"), ("data_len", "I"), ("version", "B"))

    class Request(nlmsg):  # type: ignore[misc]
        fields = (*envelope, ("name_len", "B"), ("flags", "H"), ("uid", "I"), ("pid", "I"), ("deadline", "Q"))

    class Response(nlmsg):  # type: ignore[misc]
        fields = (*envelope, ("status", "B"), ("errno", "H"))

    theirs = TheirSocket(family=NETLINK_USERSOCK)
    theirs.register_policy({REQUEST: Request})
    theirs.bind()
    raw = theirs.asyncore.socket
    raw.sendto(pack_control(HELO), (portid, 0))
    if not select.select([raw], [], [], 20)[0]:
        raise SystemExit("no HELO came")
    _, sender = raw.recvfrom(64)
    raw.connect(sender)
    while True:
        for message in theirs.get():
            answer = Response()
            answer["header"]["type"] = RESPONSE
            answer["header"]["sequence_number"] = message["header"]["sequence_number"]
            answer["index"], answer["data_len"] = message["index"], 4
            answer["version"] = VERSION
            answer.encode()
            theirs.send(answer.data)


if __name__ == "__main__":
    found, _ = Place(Path(sys.argv[2])).broker()
    {"upcall": with_upcall, "pyroute2": with_pyroute2}[sys.argv[1]](found)
