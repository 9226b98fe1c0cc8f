"""Fuzzes descriptions and payloads of id_resolver keys. A file server chooses names in descriptions, a daemon the
payload.

Raises only PeerError. A description encodes back to the same bytes. An accepted id is NUL-terminated within the
kernel's 11 bytes; an accepted name has a domain and at most 128 bytes.
"""

from __future__ import annotations

from fuzz.key_type import let_through
from fuzz.target import holds, same, taken
from upcall.protocols.request_key import id_resolver as wire

SEEDS = [
    b"uid:alice@lab.test", b"gid:staff@lab.test", b"user:1000", b"group:4294967294",
    b"1000\0", b"4294967294\0", b"alice@lab.test", b"LAB\\domain users@lab.test",
]  # fmt: skip


def run(data: bytes) -> None:
    query = taken(wire.take_description, data)
    if query is not None:
        same(wire.pack_description(query), data)
    if not 0 < len(data) <= 32767:
        return
    if let_through(wire.check_answer, b"uid:x@y", data):
        holds(len(data) <= 11 and data.index(b"\0") == len(data) - 1, "an id that the kernel would read beyond")
    if let_through(wire.check_answer, b"group:1", data):
        holds(len(data) <= 128 and b"\0" not in data and b"@" in data, "a name that the kernel could not take")
