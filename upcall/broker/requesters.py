"""Requesters in user space: any process asks its own uid's daemon, root any uid's, over a local socket."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from upcall.broker.loop import LISTENER
from upcall.errors import PeerError
from upcall.kernel.local import listen, peer_of, receive, unlink_quietly
from upcall.messages import Answer, Refusal, Requester
from upcall.wire.netlink import (
    MAX_BODY,
    Envelope,
    pack_response,
    refusal,
    response_position,
    take_request,
)

if TYPE_CHECKING:
    from upcall.broker.server import Server

STATUS = "broker.status"  # the one service that the broker answers itself
_PER_UID, _IN_ALL = 64, 1024  # connections
_SHOWN = 64  # daemons and devices in a status that would be too long
_ACCEPTS_PER_TURN, _ACCEPT_PAUSE = 8, 0.1


class Connection:
    """One requester. What it sends is answered on the same connection, by its own seq and index."""

    def __init__(self, owner: Requesters, connection: socket.socket) -> None:
        self._owner, self.socket = owner, connection
        self.pid, self.uid = peer_of(connection)
        self.open = True

    def on_readable(self) -> None:
        """One message per turn, as with daemons."""
        try:
            data = receive(self.socket)
        except OSError:
            data = b""
        if data:
            self._take(data)
        elif data is not None:
            self.close()

    def _take(self, data: bytes) -> None:
        try:
            seq, index = response_position(data)
        except PeerError:
            self.close()  # there is nothing to answer to
            return
        origin = _FromProcess(self, seq, index)
        try:
            envelope = take_request(data)
        except PeerError as error:
            self._owner.server.log("bad-request", uid=self.uid, pid=self.pid, why=error)
            origin.settle(refusal("bad-request"))
            return
        self._ask(envelope, origin)

    def _ask(self, envelope: Envelope, origin: _FromProcess) -> None:
        server = self._owner.server
        if envelope.service == STATUS:
            origin.settle(Answer(self._owner.status(None if self.uid == 0 else self.uid)))
            return
        service = server.broker.services.get(envelope.service)
        target = envelope.requester.uid
        if service is None or not service.local:
            origin.settle(refusal("no-service"))
        elif target != self.uid and self.uid != 0:
            origin.settle(refusal("not-permitted"))
        else:
            try:
                service.check_request(envelope.body)
            except PeerError:
                origin.settle(refusal("bad-request"))
                return
            deadline = envelope.deadline_ns / 1e9 or math.inf
            requester = Requester(self.uid, self.pid)
            server.broker.ask(target, service.name, requester, envelope.body, origin, server.now, deadline)

    def send(self, data: bytes) -> None:
        """An answer. A requester that does not read loses its connection: nobody waits for it."""
        if not self.open:
            return
        try:
            self.socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._owner.forget(self)
            self.socket.close()


class _FromProcess:
    """One request of a process: takes the outcome and sends it."""

    __slots__ = ("_connection", "_index", "_seq")

    def __init__(self, connection: Connection, seq: int, index: int) -> None:
        self._connection, self._seq, self._index = connection, seq, index

    def settle(self, outcome: Answer | Refusal) -> None:
        self._connection.send(pack_response(self._seq, self._index, outcome))


class Requesters:
    """The listening socket, and who is connected."""

    def __init__(self, server: Server, path: Path) -> None:
        """UsageError if a broker listens there already."""
        self.server, self._path = server, path
        self._listener = listen(path, 0o666)
        self._connections: set[Connection] = set()
        self._by_uid: Counter[int] = Counter()
        server.loop.add(self._listener, self._on_connect, LISTENER)

    def _on_connect(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor is free; asking again at once would not help
                self.server.log("no-connection", why=error)
                self.server.loop.mute(self._listener, self.server.now + _ACCEPT_PAUSE)
                return
            accepted.setblocking(False)
            connection = Connection(self, accepted)
            if self._by_uid[connection.uid] >= _PER_UID or len(self._connections) >= _IN_ALL:
                self.server.log("too-many-connections", uid=connection.uid)
                accepted.close()
                continue
            self._connections.add(connection)
            self._by_uid[connection.uid] += 1
            self.server.loop.add(accepted, connection.on_readable, connection.uid)

    def forget(self, connection: Connection) -> None:
        self.server.loop.remove(connection.socket)
        self._connections.discard(connection)
        self._by_uid[connection.uid] -= 1
        if not self._by_uid[connection.uid]:
            del self._by_uid[connection.uid]

    def status(self, uid: int | None) -> bytes:
        """JSON, cut down to what a body can hold."""
        found = self.server.status(uid)
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

    def close(self) -> None:
        for connection in tuple(self._connections):
            connection.close()
        self.server.loop.remove(self._listener)
        self._listener.close()
        unlink_quietly(self._path)
