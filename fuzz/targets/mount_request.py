"""Fuzzes requests to mount, and the replies.

Raises only PeerError. Accepted requests pack to the same bytes; texts of replies are printable.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.protocols.ecryptfs.mounting.messages import (
    MOUNT,
    UNMOUNT,
    MountReply,
    MountRequest,
    is_name,
    pack_reply,
    pack_request,
    take_made,
    take_reply,
    take_request,
)

_SIGNATURE = "0123456789abcdef"
SEEDS = [
    pack_request(MountRequest(MOUNT, "private", (_SIGNATURE,))),
    pack_request(MountRequest(MOUNT, "a.b@c+d-e", (_SIGNATURE, _SIGNATURE), 32, _SIGNATURE)),
    pack_request(MountRequest(UNMOUNT, "private", (), 0, "", True)),
    pack_reply(MountReply(0, "/home/alice/private")),
    pack_reply(MountReply(77, "é is not yours")),
    b"upcall:1000:private",
]


def run(data: bytes) -> None:
    request = taken(take_request, data)
    if request is not None:
        same(pack_request(request), data)
        holds(is_name(request.name), "a name with other characters")
    reply = taken(take_reply, data)
    if reply is not None:
        holds(reply.text.isprintable(), "a text that is not printable")
    made = take_made(data.decode("utf-8", "replace"))
    if made is not None:
        same(take_made(str(made)), made)
