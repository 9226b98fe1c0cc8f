"""Fuzzes source.sock: messages of a source, before and after it has sent its name.

Never raises. A REQUEST or NOTICE is answered once, or the connection is closed. A STATUS is answered only with the
list of registered daemons, or refused and the connection closed. Routed requests have passed the check of their
service.
"""

from __future__ import annotations

from typing import Any, cast

from fuzz.target import holds, same
from fuzz.targets.source_link import SEEDS as LINK_SEEDS
from upcall.broker.source_listener import SourceConnection, SourceListener
from upcall.core.messages import Answer, Requester
from upcall.process.listener import Asked
from upcall.protocols.catalogue import NOTICES, SERVICES
from upcall.wire.envelope import Response, pack_control
from upcall.wire.source_link import STATUS, Registrations, take_to_source, type_of

SEEDS = [*LINK_SEEDS, pack_control(100)]


class _Router:
    services, machine = SERVICES, 990
    registry = ()

    def ask(self, _: int, service: str, __: Requester, body: bytes, origin: Asked, *___: object) -> None:
        SERVICES[service].check_request(body)
        origin.settle(Answer(b"answered"))

    def notice(self, _: int, service: str, __: Requester, ___: bytes) -> str:
        holds(service in NOTICES, "a notice of a service that has none")
        return "no-daemon"


class _People:
    def line_of(self, _: int) -> frozenset[tuple[int, int]]:
        return frozenset()


class _Loop:
    now = 0.0


def _log(event: str, **_: object) -> None:
    same(str(event).isprintable(), True)


class _Connection(SourceConnection):
    """A connection without a socket."""

    def __init__(self, listener: SourceListener, name: str) -> None:
        self._listener = self._sources = listener
        self._loop = listener.loop
        self.pid, self.uid, self.pending = 7, 0, 0
        self.name, self.status = name, {}
        self.open, self.sent = True, list[bytes]()

    def answer(self, data: bytes) -> None:
        self.sent.append(data)

    tell = answer

    def close(self) -> None:
        self.open = False


def run(data: bytes) -> None:
    for name in ("", "quota"):
        listener = object.__new__(SourceListener)
        listener.loop, listener.router, listener.log = cast(Any, _Loop()), cast(Any, _Router()), cast(Any, _log)
        listener.people, listener.connected = cast(Any, _People()), {}
        connection = _Connection(listener, name)
        connection._take(data)
        said = [take_to_source(one) for one in connection.sent]
        if type_of(data) == STATUS:
            holds(not connection.open or connection.name == "quota", "a source without a name")
            holds(all(isinstance(one, Registrations) for one in said) or not connection.open, "a STATUS was answered")
        else:
            same(len(said) + (not connection.open), 1)
            holds(all(isinstance(one, Response) for one in said), "no outcome")
            holds(bool(name) or not connection.open, "served without a name")
