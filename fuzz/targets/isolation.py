"""Fuzzes messages between a daemon and the processes of its key modules, or a terminal that answers prompts.

Raises only PeerError. A message packs to the same bytes. No field exceeds the limit of its kind.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.wire import isolation as wire

SEEDS = [
    bytes(wire.pack(wire.ChildMessage(wire.OPEN, 1, text="80f0e50e8a936f95", data=b"blob"))),
    bytes(wire.pack(wire.ChildMessage(wire.WRAP, 2, 1, data=b"key"))),
    bytes(wire.pack(wire.ChildMessage(wire.ANSWER, 2, data=b"wrapped"))),
    bytes(wire.pack(wire.ChildMessage(wire.REFUSED, 3, text="locked", data=b"since 10:04"))),
    bytes(wire.pack(wire.ChildMessage(wire.PIN, 4, text="PIN", data=b"of the card"))),
]


def run(data: bytes) -> None:
    message = taken(wire.take, data)
    if message is not None:
        same(bytes(wire.pack(message)), data)
        holds(len(message.data) <= wire.MAX_DATA, "data above their limit")
        wire.fitting(message.text)
        if message.kind == wire.REFUSED:
            same(wire.pack(wire.refused_message(message.id, wire.refused_of(message)))[:2], data[:2])
