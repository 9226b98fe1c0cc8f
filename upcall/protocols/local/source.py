"""Accepts requests from user space over a local socket. A process may ask its own uid's daemon, root any daemon."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

from upcall.core.contexts import NO_LINE
from upcall.core.errors import PeerError
from upcall.core.messages import Answer, Requester
from upcall.process.listener import Asked, Connection, Listener
from upcall.wire.envelope import MAX_BODY, Envelope, refusal

STATUS = "broker.status"  # the only service that the broker answers itself
_SHOWN = 64  # daemons and devices shown if the whole status is too long


class Requesters(Listener):
    """The socket `broker.sock`, open to all users. `whole_status(uid)` returns the broker's status for a uid; None:
    for root, and for the owner of the broker's process."""

    name = "local"

    mode = 0o666
    whole_status: Callable[[int | None], dict[str, object]] = staticmethod(lambda uid: {})  # of the broker, by uid

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        """Settles the origin: checks service, permission and body, then has the router ask the daemon. Does not
        block."""
        uid = connection.uid
        if envelope.service == STATUS:
            # The owner of a user's own broker is its root.
            origin.settle(Answer(self.shown_status(None if uid in (0, os.geteuid()) else uid)))
            return
        service = self.router.services.get(envelope.service)
        target = envelope.requester.uid
        if service is None or not service.local:
            origin.settle(refusal("no-service"))
        elif target != uid and uid != 0:
            origin.settle(refusal("not-permitted"))
        else:
            try:
                service.check_request(envelope.body)
            except PeerError:
                origin.settle(refusal("bad-request"))
                return
            deadline = envelope.deadline_ns / 1e9 or math.inf
            requester = Requester(uid, connection.pid)
            origin.wants_why = envelope.wants_why and target == uid
            # Ancestors cost reads of /proc: they are looked up only if a daemon could be in a self-deadlock.
            line = NO_LINE if self.router.registry.get(target) is None else connection.line
            self.router.ask(target, service.name, requester, envelope.body, origin, self.loop.now, deadline, line)

    def shown_status(self, uid: int | None) -> bytes:
        """Returns the status as JSON, truncated to the size of a body. `uid`: the requester's; None: root, who gets
        all."""
        found = self.whole_status(uid)
        body = json.dumps(found).encode("ascii")
        if len(body) > MAX_BODY:
            for name in ("daemons", "devices"):
                rows = found[name]
                if isinstance(rows, list):
                    found[name], found[f"{name}_not_shown"] = rows[:_SHOWN], len(rows[_SHOWN:])
                    for row in rows[:_SHOWN]:
                        row.pop("pending", None)
            body = json.dumps(found).encode("ascii")
        return body
