"""The contract of handlers: one that is right keeps it, and each way of being wrong breaks the check for it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from upcall.core.errors import ModuleFailed, PeerError
from upcall.core.messages import Requester
from upcall.handler import Handler
from upcall.testing.checks import handlers
from upcall.testing.handlercontract import HANDLER_CHECKS, HandlerContract
from upcall.testing.subject import ContractBroken
from upcall.wire.envelope import Envelope

ASKING = Envelope(1, 0, "echo", Requester(1000, 1), 0, b"echo:hello")


class Echo:
    """Says what it is told, if that makes sense."""

    services: Any = ("echo",)

    def lane(self, envelope: Envelope, /) -> Any:
        return f"echo {self._told(envelope.body)!r}"

    def answer(self, envelope: Envelope, /) -> Any:
        return self._told(envelope.body)

    def explain(self, ask: bytes, /, contact: bool = False) -> Any:
        return {"answer": "would answer", "why": self._told(ask).decode()}

    def _told(self, body: bytes) -> bytes:
        if body != ASKING.body:
            raise PeerError("echo", "not what is said here")
        return body[5:]


class TestEcho(HandlerContract):
    handler = Echo()

    def asking(self) -> Envelope:
        return ASKING


class Unnamed(Echo):
    services = ("",)


class Another(Echo):
    services = ("other",)


class Slow(Echo):
    def lane(self, envelope: Envelope, /) -> Any:
        end = time.perf_counter() + 2 * handlers.QUICK
        while time.perf_counter() < end:
            pass
        return super().lane(envelope)


class Laneless(Echo):
    def lane(self, envelope: Envelope, /) -> Any:
        return None


class Kindless(Echo):
    def kind(self, envelope: Envelope, /) -> Any:
        return [envelope.body[0]]


class Breaking(Echo):
    def lane(self, envelope: Envelope, /) -> Any:
        return envelope.body.decode("ascii")


class Credulous(Echo):
    def answer(self, envelope: Envelope, /) -> Any:
        return b"yes"


class Wordy(Echo):
    def answer(self, envelope: Envelope, /) -> Any:
        return super().answer(envelope).decode()


class Endless(Echo):
    def answer(self, envelope: Envelope, /) -> Any:
        return super().answer(envelope) * 20_000


class Raising(Echo):
    def answer(self, envelope: Envelope, /) -> Any:
        raise KeyError(super().answer(envelope))


class Failing(Echo):
    """Which is no breach."""

    def answer(self, envelope: Envelope, /) -> Any:
        raise ModuleFailed("not today")


class Clinging(Echo):
    """It keeps what belongs to one request, for all threads."""

    busy = False

    def answer(self, envelope: Envelope, /) -> Any:
        answer = super().answer(envelope)
        if self.busy:
            raise RuntimeError("two at a time")
        self.busy = True
        time.sleep(0.01)
        self.busy = False
        return answer


class Cryptic(Echo):
    def explain(self, ask: bytes, /, contact: bool = False) -> Any:
        return {"answer": ask}


@pytest.mark.parametrize(
    ("handler", "broken"),
    [
        (Unnamed(), {"services_are_names"}),
        (Another(), {"services_are_names"}),
        (Slow(), {"lanes_are_found_quickly"}),
        (Laneless(), {"lanes_are_found_quickly"}),
        (Kindless(), {"lanes_are_found_quickly"}),
        (Breaking(), {"nonsense_has_no_lane"}),
        (Credulous(), {"nonsense_is_refused"}),
        (Wordy(), {"answers_are_bytes", "several_threads_may_ask"}),
        (Endless(), {"answers_are_bytes", "several_threads_may_ask"}),
        (Raising(), {"answers_are_bytes", "several_threads_may_ask"}),
        (Clinging(), {"several_threads_may_ask"}),
        (Cryptic(), {"explanations_are_data"}),
        (Failing(), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Echo) else "",
)
def test_each_broken_handler_fails_its_own_checks_only(handler: Handler, broken: set[str]) -> None:
    found = set()
    for check in HANDLER_CHECKS:
        try:
            check(handler, ASKING)
        except ContractBroken:
            found.add(check.__name__)
    assert found == broken
