"""What a message handler is: it answers the requests of some services, in the user's own name.

A handler is any object with these members; nothing is inherited. It is found by an entry point of the group
`upcall.handlers` whose name is the service that it answers; one that answers several has an entry point for each.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from upcall.wire.envelope import Envelope

GROUP = "upcall.handlers"


class Handler(Protocol):
    """Answers requests. Called from several threads at a time."""

    services: tuple[str, ...]

    def lane(self, envelope: Envelope, /) -> str:
        """What the request has to queue for: two lanes never wait for each other. Quick; PeerError if nonsense."""

    def answer(self, envelope: Envelope, /) -> bytes:
        """The answer's body. Refused, ModuleFailed or PeerError if there is none; may block."""


@runtime_checkable
class Notified(Protocol):
    """What a handler has as well if its service has something to tell: messages that want no answer."""

    def notice(self, envelope: Envelope, /) -> None:
        """Takes a notice; may block. Whatever it raises is logged, and that is all."""


@runtime_checkable
class Named(Protocol):
    """What a handler has as well if there is more to say than its service of who answers, for records."""

    def answered_by(self, envelope: Envelope, /) -> str:
        """Whoever answers this, or ""; quick, and raises nothing."""


@runtime_checkable
class Explaining(Protocol):
    """What a handler has as well if it can say beforehand what it would answer, and why: for `upcall explain`."""

    def explain(self, ask: bytes, /, contact: bool = False) -> dict[str, Any]:
        """What would become of a request with the body `ask`; JSON-able, without secrets. PeerError if nonsense.

        "answer" is "would answer" or the reason of a refusal, "why" says more for people. "credential" is what would
        be used, or None; "candidates" all that were looked at, each with "name", "principal", "expires" (seconds since
        1970, or None) and "verdict". More is the handler's own. Nobody is asked anything, unless `contact` says so.
        """
