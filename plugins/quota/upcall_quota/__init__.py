"""Delivers quota notices to sinks, such as desktop, terminal, mail and log.

Each sink has a thread and a queue of its own (`delivery.py`), made at the first notice, so a sink that hangs blocks
neither other sinks nor the daemon.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError
from upcall.process import machine
from upcall.process.log import EventLog
from upcall.protocols.quota.notice import SERVICE, USER, QuotaNotice, printable, sentence, take
from upcall.wire.envelope import Envelope
from upcall_quota.delivery import Delivery
from upcall_quota.sinks import Opener, configured

__all__ = ["QuotaHandler", "handler"]


class QuotaHandler:
    """A handler of quota notices. Answers no requests. Thread-safe."""

    services: tuple[str, ...] = (SERVICE,)

    def __init__(self, find: Callable[[], Mapping[str, Opener]] = configured, uid: int | None = None) -> None:
        """`find`: returns the configured sinks. `uid`: of the daemon; None: the process's."""
        self._find, self._uid = find, uid
        self._lock = threading.Lock()
        self._deliveries: list[Delivery] | None = None

    def lane(self, envelope: Envelope, /) -> str:
        take(envelope.body)
        return SERVICE

    def answer(self, envelope: Envelope, /) -> bytes:
        raise Refused("no-service", why="quota only gives notice")

    def notice(self, envelope: Envelope, /) -> None:
        """Queues a notice for all sinks; does not block. PeerError if it is malformed or concerns another user;
        ModuleFailed if the configuration is wrong."""
        told = take(envelope.body)
        uid = os.geteuid() if self._uid is None else self._uid
        machines = uid == machine.uid()
        check_meant_for(told, uid, machines)
        text = printable(sentence(told, time.time(), None if machines else uid))
        for delivery in self._delivering():
            delivery.put(told, text)

    def _delivering(self) -> list[Delivery]:
        with self._lock:
            if self._deliveries is None:
                try:
                    found = self._find()
                except UpcallError as error:
                    raise ModuleFailed(str(error)) from error
                log = EventLog("upcall-quota")
                self._deliveries = [Delivery(name, opener, log) for name, opener in found.items()]
            return self._deliveries


def check_meant_for(notice: QuotaNotice, uid: int, machines: bool) -> None:
    """Checks that a notice concerns this daemon's user. PeerError if it concerns another user.

    `machines`: this is the machine's daemon, which receives the notices of all users. This guards against faults of
    the broker. A notice of a group's or project's quota concerns the user whose write caused it. If the cause is
    unknown, it is accepted: the broker sends it to users whom it notified of this quota before.
    """
    about = notice.subject.id if notice.subject.kind == USER else None
    if machines or uid in (about, notice.cause.uid) or (about is None and notice.cause.uid is None):
        return
    whose = about if about is not None else notice.cause.uid
    raise PeerError("quota notice", f"is about uid {whose}, this is the daemon of {uid}")


handler = QuotaHandler()
