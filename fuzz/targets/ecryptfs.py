"""Fuzzes frames of /dev/ecryptfs and their packets, from the kernel, daemons and requesters.

Raises only PeerError. Frames, packets and file keys encode back to the same bytes. Answers that check_answer accepts
have the right tag, and a wrapped key never contains the clear key.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs import packets as wire

_SIGNATURE = "80f0e50e8a936f95"
_KEY = wire.pack_file_key(wire.FileKey(7, bytes(range(16))))
_WRAP = wire.pack_ask(wire.Ask(0x42, _SIGNATURE, _KEY))
_UNWRAP = wire.pack_ask(wire.Ask(0x40, _SIGNATURE, b"w" * 256))
_WRAPPED = wire.pack_reply(wire.Reply(0x43, 0, b"w" * 256))
SEEDS = [
    wire.pack_frame(wire.Frame(wire.REQUEST, 301, 5, _WRAP)),
    bytes.fromhex("6400000000"),
    bytes.fromhex("660000012d"),
    *(len(ask).to_bytes(2, "big") + ask + reply for ask in (_WRAP, _UNWRAP) for reply in (_WRAPPED, _KEY)),
    _KEY,
]


def run(data: bytes) -> None:
    frame = taken(wire.take_frame, data)
    if frame is not None:
        same(wire.take_frame(wire.pack_frame(frame)), frame)
    key = taken(wire.take_file_key, data)
    if key is not None:
        same(wire.pack_file_key(key), data)
    middle = 2 + int.from_bytes(data[:2], "big")
    asked, answer = data[2:middle], data[middle:]
    ask, reply = taken(wire.take_ask, asked), taken(wire.take_reply, answer)
    if ask is not None:
        same(wire.take_ask(wire.pack_ask(ask)), ask)
    if reply is not None and reply.status == 0:
        same(wire.take_reply(wire.pack_reply(reply)), reply)
    if ask is not None:
        try:
            wire.check_answer(asked, answer)
        except PeerError:
            return
        holds(reply is not None and reply.tag == ask.tag + 1, "an answer of another tag")
