"""Defines the checks of the contract of message handlers. `HANDLER_CHECKS` lists them in the order in which to run
them.

Each is a function of (handler, a valid request) that raises ContractBroken, or NotApplicable. Does not need pytest.
Requests may be refused: the machine may have no tickets and no servers. But each result must be bytes, or one of the
errors of `Handler.answer`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator

from upcall.core.errors import ModuleFailed, PeerError, Refused
from upcall.core.messages import Answer
from upcall.handler import Explaining, Handler, Varied
from upcall.testing.subject import ContractBroken, NotApplicable, described
from upcall.wire.envelope import MAX_BODY, MAX_NAME, Envelope, pack_response

QUICK = 0.005  # seconds for the fastest of a few calls of `lane` and `kind`, which run in the worker at the socket
PATIENCE = 20.0  # seconds for one answer
THREADS, CALLS = 8, 4

HandlerCheck = Callable[[Handler, Envelope], None]


def services_are_names(handler: Handler, asking: Envelope) -> None:
    for name in handler.services:
        if not (isinstance(name, str) and name.isascii() and name.isprintable() and 1 <= len(name) <= MAX_NAME):
            raise ContractBroken(f"the service {name!r} is not 1 to {MAX_NAME} printable ASCII characters")
    if asking.service not in handler.services:
        raise ContractBroken(f"{asking.service!r} is asked for, {', '.join(handler.services)} are its services")


def lanes_are_found_quickly(handler: Handler, asking: Envelope) -> None:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        lane = handler.lane(asking)
        kind = handler.kind(asking) if isinstance(handler, Varied) else 0
        times.append(time.perf_counter() - begun)
        if not isinstance(lane, str) or not lane:
            raise ContractBroken(f"`lane` gave {type(lane).__name__}, a text is needed")
        if not isinstance(kind, (int, str)):
            raise ContractBroken(f"`kind` gave {type(kind).__name__}, a text or a number is needed")
    if min(times) > QUICK:
        raise ContractBroken(f"`lane` takes {min(times) * 1e3:.0f} ms, at most {QUICK * 1e3:.0f} are right")


def nonsense_has_no_lane(handler: Handler, asking: Envelope) -> None:
    for body in _nonsense(asking.body):
        try:
            handler.lane(asking._replace(body=body))
        except PeerError:
            continue
        except Exception as error:  # handlers raise anything
            raise ContractBroken(f"`lane` raised {described(error)} for {len(body)} bytes of nonsense") from error


def nonsense_is_refused(handler: Handler, asking: Envelope) -> None:
    for body in _nonsense(asking.body):
        if _answered(handler, asking._replace(body=body)):
            raise ContractBroken(f"{len(body)} bytes of nonsense were answered")


def answers_are_bytes(handler: Handler, asking: Envelope) -> None:
    _answered(handler, asking)


def several_threads_may_ask(handler: Handler, asking: Envelope) -> None:
    broken: list[ContractBroken] = []

    def work() -> None:
        try:
            for _ in range(CALLS):
                _answered(handler, asking)
        except ContractBroken as error:
            broken.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        if thread.is_alive():
            raise ContractBroken(f"{THREADS} threads are not done after {PATIENCE:g} s")
    if broken:
        raise broken[0]


def explanations_are_data(handler: Handler, asking: Envelope) -> None:
    if not isinstance(handler, Explaining):
        raise NotApplicable("it has no `explain`")
    told = handler.explain(asking.body)
    try:
        json.dumps(told)
    except (TypeError, ValueError) as error:
        raise ContractBroken(f"`explain` gave what is not JSON: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("answer"), str):
        raise ContractBroken("`explain` does not say what would be answered")


HANDLER_CHECKS: tuple[HandlerCheck, ...] = (
    services_are_names,
    lanes_are_found_quickly,
    nonsense_has_no_lane,
    nonsense_is_refused,
    answers_are_bytes,
    several_threads_may_ask,
    explanations_are_data,
)


def _answered(handler: Handler, envelope: Envelope) -> bool:
    """Returns whether the handler answers. ContractBroken if the daemon could not send the result."""
    try:
        answer = handler.answer(envelope)
    except (Refused, ModuleFailed, PeerError):
        return False
    except Exception as error:  # handlers raise anything
        raise ContractBroken(f"`answer` raised {described(error)}") from error
    if not isinstance(answer, bytes):
        raise ContractBroken(f"`answer` gave {type(answer).__name__}, bytes are needed")
    if len(answer) > MAX_BODY:
        raise ContractBroken(f"an answer of {len(answer)} bytes, at most {MAX_BODY} can be sent")
    pack_response(envelope.seq, envelope.index, Answer(answer))
    return True


def _nonsense(good: bytes) -> Iterator[bytes]:
    """Yields malformed bodies: truncated, extended, constant and random ones."""
    step = max(1, len(good) // 64)
    yield from (good[:size] for size in range(0, len(good), step))
    yield good + b"\0"
    yield bytes(MAX_BODY)
    yield b"\xff" * 64
    yield from (os.urandom(size) for size in (1, 16, 300))
