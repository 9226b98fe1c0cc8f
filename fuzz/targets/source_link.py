"""Fuzzes messages on source.sock in both directions, between sources and the broker.

Raises only PeerError. Accepted messages pack to the same bytes, except for fields that are ignored. No field exceeds
its limit.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.core.messages import Answer, Requester
from upcall.wire.envelope import NOTICE, REQUEST, Envelope, pack_response, refusal
from upcall.wire.source_link import (
    MAX_STATUS,
    MAX_TARGETED,
    MOST_UIDS,
    REGISTERED,
    STATUS,
    UNREGISTERED,
    FromSource,
    Registrations,
    pack_from_source,
    pack_registrations,
    pack_status,
    take_from_source,
    take_status,
    take_to_source,
    type_of,
)

SEEDS = [
    pack_status("quota", 0, {"listening": True, "why": ""}),
    pack_from_source(FromSource(NOTICE, 1000, Envelope(1, 0, "quota", Requester(1001, 0), 0, b"{}"))),
    pack_from_source(FromSource(REQUEST, 1000, Envelope(2, 0, "key", Requester(1000, 9), 10**15, b"body"))),
    *pack_registrations(REGISTERED, [0, 1000, 1001], whole=True),
    *pack_registrations(REGISTERED, [], whole=True),
    *pack_registrations(UNREGISTERED, [1000]),
    pack_response(1, 0, Answer(b"")),
    pack_response(1, 0, refusal("daemon-full")),
]


def run(data: bytes) -> None:
    message = taken(take_from_source, data)
    if message is not None:
        same(message.kind, type_of(data))
        holds(len(message.envelope.body) <= (MAX_STATUS if message.kind == STATUS else MAX_TARGETED), "a long body")
        same(take_from_source(pack_from_source(message)), message)
        same(len(pack_from_source(message)), len(data))
        taken(take_status, message.envelope.body)
    said = taken(take_to_source, data)
    if isinstance(said, Registrations):
        holds(len(said.uids) <= MOST_UIDS, "too many uids")
        again = [take_to_source(one) for one in pack_registrations(*said)]
        same(again, [said] if said.uids or said.whole else [])
