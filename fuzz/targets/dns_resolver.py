"""Fuzzes descriptions, callouts and payloads of dns_resolver keys. Any user makes the first two, a daemon the payload.

Raises only PeerError. A payload encodes back to the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.target import holds, same, taken
from upcall.protocols.request_key import dns_resolver as wire
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance

_VECTORS = json.loads((Path(__file__).parents[2] / "tests/vectors/dns_resolver.json").read_text())
_ASKED = [b"host.test", b"a:host.test", b"aaaa:host.test", b"afsdb:cell.test", b"192.0.2.1", b"2001:db8::1"]
SEEDS = [
    *(bytes.fromhex(one["payload"]) for one in _VECTORS["good"]),
    *(one + b"\0ipv4 list srv=1" for one in _ASKED),
]


def run(data: bytes) -> None:
    name, _, options = data.partition(b"\0")
    query = taken(wire.take_description, name)
    if query is not None:
        found = taken(wire.take_callout, options, query)
        holds(found is None or set(found.families) <= {4, 6}, "another family")
    payload = taken(wire.take_payload, data)
    if isinstance(payload, wire.Text):
        same(wire.pack_text(payload), data)
    elif payload is not None:
        same(wire.pack_servers(payload), data)
    if 0 < len(data) <= 32767:
        for asked in _ASKED:
            taken(wire.check_answer, pack_ask(Ask(asked, b"srv=1 list")), pack_instance(Instance(60, data)))
