"""What a message handler is: it answers the requests of some services, in the user's own name.

A handler is any object with these members; nothing is inherited. It is found by an entry point of the group
`upcall.handlers` whose name is the service that it answers; one that answers several has an entry point for each.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Waits(Protocol):
    """Self-deadlock detection: requests of `services` whose requester may be this very process, or a child of it,
    which the kernel does not say. Called from any thread."""

    services: tuple[str, ...]
    refuse: Callable[[Any, str], None]  # set by the daemon: answers a job; the text says for people who waits

    def hold(self, seq: int, deadline: float, lane: str, job: Any, /) -> bool:
        """A request has come, to be answered before `deadline` (seconds, monotonic). False: it must be refused now."""

    def let_go(self, seq: int, /) -> bool:
        """It has its outcome. False if it was refused meanwhile, and must not be answered again."""

    def look(self) -> None:
        """Called every 20 ms while requests are worked on; refuses what waits for itself, and must not wait."""


@runtime_checkable
class SelfWaiting(Protocol):
    """What a handler has as well if its requests could wait for the daemon itself."""

    waits: Waits


@runtime_checkable
class Explaining(Protocol):
    """What a handler has as well if it can say beforehand what it would answer, and why: for `upcall explain`."""

    def explain(self, ask: bytes, /, contact: bool = False) -> dict[str, Any]:
        """What would become of a request with the body `ask`; JSON-able, without secrets. PeerError if nonsense.

        "answer" is "would answer" or the reason of a refusal, "why" says more for people. "credential" is what would
        be used, or None; "candidates" all that were looked at, each with "name", "principal", "expires" (seconds since
        1970, or None) and "verdict". More is the handler's own. Nobody is asked anything, unless `contact` says so.
        """
