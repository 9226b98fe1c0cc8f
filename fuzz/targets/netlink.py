"""Fuzzes messages of the link and of broker.sock, from any process.

Raises only PeerError. Accepted messages pack to the same bytes, except for fields that are ignored. No body exceeds
its limit.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.core.messages import Answer, Refusal, Requester
from upcall.wire.envelope import (
    HELO,
    MAX_BODY,
    MAX_WHY,
    NOTICE,
    QUIT,
    REQUEST,
    Envelope,
    pack_control,
    pack_message,
    pack_request,
    pack_response,
    refusal,
    response_position,
    take_message,
    take_request,
    take_response,
)

SEEDS = [
    pack_control(HELO),
    pack_control(QUIT, 7),
    pack_request(Envelope(1, 2, "key", Requester(1000, 99), 10**12, b"body")),
    pack_request(Envelope(0, 0, "quota", Requester(0, 0), 0, b""), NOTICE),
    pack_response(1, 2, Answer(b"body")),
    pack_response(3, 4, refusal("locked")),
    pack_response(3, 4, refusal("locked", why="since 10:04, by upcall lock")),
    pack_response(3, 4, refusal("locked", why="\u00e9" * 100)),
    pack_request(Envelope(1, 2, "key", Requester(1000, 99), 10**12, b"body", wants_why=True)),
]


def run(data: bytes) -> None:
    message = taken(take_message, data)
    if message is not None:
        same(pack_message(message), data)
    position = taken(response_position, data)
    asked = taken(take_request, data)
    if asked is not None:
        holds(len(asked.body) <= MAX_BODY, "a body above its limit")
        kind = REQUEST if message is not None and message.type == REQUEST else NOTICE
        same(take_request(pack_request(asked, kind)), asked)
        same(len(pack_request(asked, kind)), len(data))
    answer = taken(take_response, data)
    if answer is not None:
        same(position, (answer.seq, answer.index))
        again = take_response(pack_response(answer.seq, answer.index, answer.outcome))
        same(again, answer)
        if isinstance(answer.outcome, Refusal):
            holds(len(answer.outcome.why.encode()) <= MAX_WHY, "a why above its limit")
            holds(answer.outcome.why.isprintable(), "a why that is not printable")
