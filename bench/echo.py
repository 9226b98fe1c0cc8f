"""Answers every REQUEST with an empty answer, by upcall's netlink code or by pyroute2's.

python -m bench.echo upcall|pyroute2 FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from upcall.core.messages import Answer
from upcall.daemon.broker_link import BrokerLink
from upcall.kernel.netlink import NETLINK_USERSOCK
from upcall.process.paths import Place
from upcall.wire.envelope import REQUEST, RESPONSE, VERSION, pack_response, take_request


def registered(folder: Path) -> BrokerLink:
    link = BrokerLink(Place(folder))
    link.take(20)
    if not link.greet(20):
        raise SystemExit("no HELO came")
    return link


def with_upcall(link: BrokerLink) -> None:
    """Answers by upcall's code. Checks credentials and all lengths, as the daemon does."""
    sender = link.sender
    while True:
        packet = link.receive()
        if packet is None or packet[1:] != sender:
            continue
        envelope = take_request(packet.data)
        link.send(pack_response(envelope.seq, envelope.index, Answer(b"")))


def with_pyroute2(link: BrokerLink) -> None:
    """Answers by pyroute2 as documented: classes with fields, `get` to decode, `encode` to encode.

    Does not check senders, because pyroute2 does not report credentials. Registers by upcall's code for the same
    reason.
    """
    from pyroute2.netlink import nlmsg  # type: ignore[import-untyped]
    from pyroute2.netlink.nlsocket import NetlinkSocket as TheirSocket  # type: ignore[import-untyped]

    envelope = (("index", "I"), ("data_len", "I"), ("version", "B"))

    class Request(nlmsg):  # type: ignore[misc]
        fields = (*envelope, ("name_len", "B"), ("flags", "H"), ("uid", "I"), ("pid", "I"), ("deadline", "Q"))

    class Response(nlmsg):  # type: ignore[misc]
        fields = (*envelope, ("status", "B"), ("errno", "H"))

    theirs = TheirSocket(family=NETLINK_USERSOCK, use_socket=link.socket.socket)
    theirs.register_policy({REQUEST: Request})
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
    {"upcall": with_upcall, "pyroute2": with_pyroute2}[sys.argv[1]](registered(Path(sys.argv[2])))
