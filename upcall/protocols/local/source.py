"""Accepts requests from user space over a local socket: of a process for its own uid's daemon, of root for any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from upcall.core.contexts import NO_LINE
from upcall.core.errors import PeerError
from upcall.core.messages import Answer, Requester
from upcall.process.listener import Asked, Connection, Listener
from upcall.wire.envelope import MAX_BODY, Envelope, refusal

STATUS = "broker.status"  # the one service that the broker answers itself
_SHOWN = 64  # daemons and devices in a status that would be too long


class Requesters(Listener):
    """The socket that is open to all."""

    name = "local"

    mode = 0o666
    whole_status: Callable[[int | None], dict[str, object]] = staticmethod(lambda uid: {})  # of the broker, by uid

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        uid = connection.uid
        if envelope.service == STATUS:
            origin.settle(Answer(self.shown_status(None if uid == 0 else uid)))
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
            # From whom it descends is looked up only if there is a daemon that could be waiting for itself.
            line = NO_LINE if self.router.registry.get(target) is None else connection.line
            self.router.ask(target, service.name, requester, envelope.body, origin, self.loop.now, deadline, line)

    def shown_status(self, uid: int | None) -> bytes:
        """JSON, cut down to what a body can hold."""
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
