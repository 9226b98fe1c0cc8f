"""Fuzzes quota warnings of VFS_DQUOT (generic netlink) and their coalescing: from a newer kernel, or another sender.

Raises only PeerError. Messages lie within their datagram. A warning packs to one that parses to the same values.
Coalescing never raises, keeps within its limits, and counts every message once.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.core.errors import PeerError
from upcall.protocols.quota import warning as wire
from upcall.protocols.quota.coalescing import IN_ALL, Folding

_FAMILY = 0x17
_WARNED = wire.Warned(0, 1000, 4, 8, 1, 1000)
SEEDS = [wire.pack(_WARNED, _FAMILY, 1), wire.pack(_WARNED, _FAMILY, 2) * 3, wire.pack(_WARNED, 3, 9)]


def run(data: bytes) -> None:
    found = []
    try:
        for message in wire.messages(data):
            found.append(message)
    except PeerError:
        pass
    holds(sum(len(one.data) for one in found) <= len(data), "messages beyond their datagram")
    for one in found:
        warned = taken(wire.take, one.data)
        if warned is not None:
            same(wire.take(wire.pack(warned, _FAMILY, 1)), warned)
    folding = Folding(_FAMILY)
    folding.add([data, data[:76], data])
    holds(len(folding) + folding.folded + folding.dropped == folding.received, "a message counted twice, or never")
    holds(len(folding) <= IN_ALL, "too many kept")
    for body in folding.take():
        taken(wire.take_attributes, body)
