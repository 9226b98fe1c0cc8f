"""Fuzzes broker.sock: messages of any process.

Never raises. Each message is answered once, or its connection is closed. An ordinary user's request reaches only that
user's daemon, after the check of its service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fuzz.target import holds, same
from upcall.core.messages import Answer, Refusal, Requester
from upcall.process.listener import Asked, Connection
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs.packets import Ask, pack_ask
from upcall.protocols.local.source import Requesters
from upcall.wire.envelope import Envelope, pack_control, pack_request, take_response

_UID = 1000
_BODY = pack_ask(Ask(0x40, "80f0e50e8a936f95", b"w" * 64))
SEEDS = [
    pack_request(Envelope(1, 2, "key", Requester(_UID, 1), 10**15, _BODY)),
    pack_request(Envelope(1, 2, "key", Requester(0, 1), 0, _BODY)),
    pack_request(Envelope(1, 2, "ecryptfs", Requester(_UID, 1), 0, _BODY)),
    pack_request(Envelope(1, 2, "broker.status", Requester(_UID, 1), 0, b"")),
    pack_request(Envelope(1, 2, "key", Requester(_UID, 1), 10**15, _BODY, wants_why=True)),
    pack_control(100),
]


class _Broker:
    services = SERVICES
    registry: Mapping[int, object] = {}

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, bytes]] = []

    def ask(self, uid: int, service: str, requester: Requester, body: bytes, origin: Asked, *_: object) -> None:
        holds(uid == _UID and requester.uid == _UID, "a request of another's daemon")
        SERVICES[service].check_request(body)
        self.asked.append((uid, service, body))
        origin.settle(Answer(b"answered"))


class _Loop:
    now = 0.0


def _log(event: str, **fields: object) -> None:
    same(str(event).isprintable(), True)


def _status(uid: int | None) -> dict[str, object]:
    same(uid, _UID)
    return {"daemons": []}


class _Connection(Connection):
    """A connection without a socket."""

    def __init__(self, listener: Requesters) -> None:
        self._listener, self._loop = listener, listener.loop
        self.pid, self.uid, self.pending = 7, _UID, 0
        self._line = frozenset()
        self.open, self.sent = True, list[bytes]()

    def answer(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        self.open = False


def run(data: bytes) -> None:
    listener = object.__new__(Requesters)
    listener.loop, listener.router, listener.log = cast(Any, _Loop()), cast(Any, _Broker()), cast(Any, _log)
    listener.whole_status = _status
    connection = _Connection(listener)
    connection._take(data)
    same(len(connection.sent) + (not connection.open), 1)
    for sent in connection.sent:
        outcome = take_response(sent).outcome
        holds(isinstance(outcome, Answer | Refusal), "no outcome")
