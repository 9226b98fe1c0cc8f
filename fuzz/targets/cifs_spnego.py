"""Fuzzes descriptions and payloads of cifs.spnego keys. Any user can make descriptions, a daemon the payload.

Raises only PeerError. Both encode back to the same bytes or are refused. A payload's lengths match its size.
"""

from __future__ import annotations

import struct

from fuzz.target import holds, same, taken
from upcall.protocols.request_key import cifs_spnego as wire
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance

_TEXT = b"ver=0x2;host=a.test;ip4=192.0.2.1;sec=krb5;uid=0x0;creduid=0x3e8;user=ada;pid=0x7"
SEEDS = [
    _TEXT,
    _TEXT + b";upcall_target=app",
    b"ver=0x2;host=[::1];ip6=::1;sec=mskrb5;uid=0x0;creduid=0x3e8;pid=0x7",
    wire.pack_payload(b"k" * 16, b"b" * 16),
    struct.pack("<IIII", 2, 0, 64, 1 << 31) + bytes(80),
]


def run(data: bytes) -> None:
    asked = taken(wire.take_description, data)
    if asked is not None:
        packed = taken(wire.pack_description, asked)
        if packed is not None:
            same(wire.take_description(packed), asked)
    found = taken(wire.take_payload, data)
    if found is not None:
        same(wire.pack_payload(*found), data)
        holds(16 + sum(map(len, found)) == len(data), "lengths that do not add up")
    if data and len(data) < 4000:
        taken(wire.check_request, pack_ask(Ask(data, b"")))
        taken(wire.check_answer, b"", pack_instance(Instance(1, data)))
