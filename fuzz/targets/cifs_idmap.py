"""Fuzzes descriptions and payloads of cifs.idmap keys. A file server chooses SIDs in descriptions, a daemon the
payload.

Raises only PeerError. All encode back to the same bytes. An accepted payload is an id of 4 bytes, or a SID whose count
is correct.
"""

from __future__ import annotations

from fuzz.key_type import let_through
from fuzz.target import holds, same, taken
from upcall.protocols.request_key import cifs_idmap as wire

SEEDS = [
    b"os:S-1-5-21-1-2-3-1000", b"gs:S-1-0x100000000-1", b"oi:1000", b"gi:4294967294",
    wire.pack_id(1000), wire.pack_sid(wire.Sid(5, (21, 1, 2, 3, 1000))), wire.pack_sid(wire.Sid(5, tuple(range(15)))),
]  # fmt: skip


def run(data: bytes) -> None:
    query = taken(wire.take_description, data)
    if query is not None:
        same(wire.pack_description(query), data)
    if not 0 < len(data) <= 32767:
        return
    if let_through(wire.check_answer, b"os:S-1-5-18", data):
        same(wire.pack_id(wire.take_payload_id(data)), data)
        holds(len(data) == 4, "an id of another size")
    if let_through(wire.check_answer, b"gi:1", data):
        same(wire.pack_sid(wire.take_payload_sid(data)), data)
        holds(8 + 4 * data[1] <= len(data) == 68, "a SID that the kernel would read beyond")
