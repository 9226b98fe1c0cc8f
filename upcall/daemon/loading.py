"""Loads the key modules and handlers of the daemon's settings, when they are first needed."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable

from upcall.core.errors import ModuleFailed
from upcall.daemon.plugins import Module, ServiceHandler
from upcall.handler import Handler, Notified
from upcall.keymodule import KeyModule
from upcall.keys.plugins import load, load_handler
from upcall.process.log import EventLog
from upcall.wire.envelope import Envelope

_RELOAD = 5.0  # seconds until a handler that failed to load is retried


def loaders(
    modules: Iterable[Module], deadline: Callable[[], float], log: EventLog
) -> dict[str, Callable[[], KeyModule]]:
    """Returns alias -> function that loads the key module. That of a denied one raises ModuleFailed.

    `deadline()`: the deadline of the calling thread's request, in seconds of CLOCK_MONOTONIC; 0 if it has none.
    """
    found: dict[str, Callable[[], KeyModule]] = {}
    for module in modules:
        if module.denied:
            found[module.alias] = functools.partial(_denied, module.denied)
        elif module.isolated:
            found[module.alias] = functools.partial(_apart, module.alias, module.spec, deadline, log)
        else:
            found[module.alias] = functools.partial(load, module.spec)
    return found


def _denied(why: str) -> KeyModule:
    raise ModuleFailed(why)


def _apart(alias: str, spec: str, deadline: Callable[[], float], log: EventLog) -> KeyModule:
    from upcall.daemon.isolation.module import IsolatedModule  # only who has one pays for it

    return IsolatedModule(alias, spec, deadline, log)


class LazyHandler:
    """A handler that is imported at the first request for its service: most daemons never need most handlers."""

    def __init__(self, service: str, spec: str) -> None:
        self.services: tuple[str, ...] = (service,)
        self._spec = spec
        self._lock = threading.Lock()
        self._handler: Handler | None = None
        self._failed, self._retry = "", 0.0

    def lane(self, envelope: Envelope) -> str:
        """Returns the handler's lane once it is imported. Importing is slow, so `answer` does it, not `lane`."""
        return f"loading {envelope.service}" if self._handler is None else self._handler.lane(envelope)

    def answer(self, envelope: Envelope) -> bytes:
        return self._loaded().answer(envelope)

    def answered_by(self, envelope: Envelope) -> str:
        return self._spec

    def notice(self, envelope: Envelope) -> None:
        handler = self._loaded()
        if not isinstance(handler, Notified):
            raise ModuleFailed(f"handler {self._spec}: takes no notices")
        handler.notice(envelope)

    def _loaded(self) -> Handler:
        with self._lock:
            if self._handler is None:
                if time.monotonic() < self._retry:
                    raise ModuleFailed(self._failed)
                try:
                    self._handler = load_handler(self._spec, self.services[0])
                except ModuleFailed as error:
                    self._failed, self._retry = str(error), time.monotonic() + _RELOAD
                    raise
            return self._handler


def handlers(entries: Iterable[ServiceHandler]) -> list[Handler]:
    """Returns a handler for each entry, which is imported when it is first needed."""
    return [LazyHandler(entry.service, entry.spec) for entry in entries]
