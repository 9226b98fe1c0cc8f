"""What a message handler is: it answers the requests of some services, in the user's own name.

A handler is any object with these members; nothing is inherited. It is found by an entry point of the group
`upcall.handlers`.
"""

from __future__ import annotations

from typing import Protocol

from upcall.wire.netlink import Envelope

GROUP = "upcall.handlers"


class Handler(Protocol):
    """Answers requests. Called from several threads at a time."""

    services: tuple[str, ...]

    def lane(self, envelope: Envelope, /) -> str:
        """What the request has to queue for: two lanes never wait for each other. Quick; PeerError if nonsense."""

    def answer(self, envelope: Envelope, /) -> bytes:
        """The answer's body. Refused, ModuleFailed or PeerError if there is none; may block."""
