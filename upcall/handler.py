"""Defines the interface of message handlers, which answer the requests of services in a user's daemon.

A handler is any object with the members of `Handler`; nothing is inherited. The daemon finds it by an entry point of
the group `upcall.handlers`, named for the service that it answers. One that answers several has one for each. The
other protocols here are optional: the daemon uses each one that a handler implements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from upcall.wire.envelope import Envelope

GROUP = "upcall.handlers"


class Handler(Protocol):
    """Answers requests. The daemon's worker threads call it, several at a time: it must be thread-safe."""

    services: tuple[str, ...]  # names of the services that it answers

    def lane(self, envelope: Envelope, /) -> str:
        """Returns the queue for a request, such as the key's signature. Requests in different queues do not wait for
        each other. Called in the worker that receives: it must not block. PeerError if the request is malformed."""

    def answer(self, envelope: Envelope, /) -> bytes:
        """Returns the answer's body, at most 64 KiB. May block until `envelope.deadline_ns` (CLOCK_MONOTONIC, ns).

        Body and answer have the format of `envelope.service`, see docs/protocol.md. "key" and "ecryptfs": a tag 64 or
        66 packet, answered by a tag 65 or 67 packet (upcall/protocols/ecryptfs/packets.py). Types of request_key,
        such as "dns_resolver": an Ask, answered by an Instance (upcall/protocols/request_key/messages.py).

        Refused: not granted, with a reason. ModuleFailed: could not be carried out; refused as "module-failed".
        PeerError: malformed; refused as "bad-request". Any other exception is refused as "module-broke" and logged.
        `envelope.requester`: the requesting process as the broker knows it; its pid is 0 if the kernel does not say.
        """


@runtime_checkable
class Varied(Protocol):
    """A handler whose requests in one lane take differently long. The daemon learns how long each kind takes, and runs
    quick ones one after another in the same thread."""

    def kind(self, envelope: Envelope, /) -> str | int:
        """Returns the kind of a request that `lane` has accepted, such as its verb; one of a few. Must not block."""


@runtime_checkable
class Notified(Protocol):
    """A handler that takes notices: messages without an answer."""

    def notice(self, envelope: Envelope, /) -> None:
        """Handles a notice, in a worker thread; may block. Exceptions are logged."""


@runtime_checkable
class Named(Protocol):
    """A handler that names what answers a request, such as a key module, for the records of requests."""

    def answered_by(self, envelope: Envelope, /) -> str:
        """Returns the name of what answers this request, or "". Must not block or raise."""


class Waits(Protocol):
    """Self-deadlock detection, for services whose requester may be the daemon itself or its child, and where the
    kernel does not report the requester. Called from any thread."""

    services: tuple[str, ...]
    refuse: Callable[[Any, str], None]  # set by the daemon: (job, the waiting threads and processes in words)

    def hold(self, seq: int, deadline: float, lane: str, job: Any, /) -> bool:
        """Registers a request. `seq`: its sequence number; `deadline`: seconds of CLOCK_MONOTONIC; `lane`: as of
        Handler.lane; `job`: passed to `refuse`. False: the daemon must refuse it at once."""

    def let_go(self, seq: int, /) -> bool:
        """Unregisters a request that has its outcome. False if `refuse` was called for it: do not answer again."""

    def look(self) -> None:
        """Refuses requests that are part of a self-deadlock. Called every 20 ms while requests are being handled, so
        it must not block."""


@runtime_checkable
class SelfWaiting(Protocol):
    """A handler whose requests could wait for the daemon itself (self-deadlock)."""

    waits: Waits


@runtime_checkable
class Explaining(Protocol):
    """A handler that can predict its answers, with reasons, for `upcall explain`."""

    def explain(self, ask: bytes, /, contact: bool = False) -> dict[str, Any]:
        """Predicts the answer to a request with the body `ask`. Returns JSON-able data without secrets.

        "answer": "would answer" or the reason of a refusal; "why": details for people. "credential": what would be
        used, or None; "candidates": all that were considered, each with "name", "principal", "expires" (seconds since
        1970, or None) and "verdict". Other keys are the handler's own. Contacts no server and opens no prompt unless
        `contact` is true. PeerError if `ask` is malformed.
        """
