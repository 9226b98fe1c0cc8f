"""Accepts sources in processes of their own at source.sock: forwards their requests and notices, reports
registrations.

Only the broker's own user may connect (0600, and SO_PEERCRED). A connection begins with STATUS, which names the
source; a second source of the same name is refused. The broker sends all registered uids, and then each change. A
source that does not read loses its connection, and gets the whole list on the next one.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcall.core.errors import PeerError
from upcall.core.messages import Answer
from upcall.core.router import Router
from upcall.core.service import Notice
from upcall.process.listener import Asked, Connection, Listener
from upcall.process.log import EventLog
from upcall.process.loop import Loop
from upcall.process.people import People
from upcall.protocols.catalogue import NOTICES
from upcall.wire.envelope import NOTICE, pack_response, refusal, response_position
from upcall.wire.source_link import (
    REGISTERED,
    STATUS,
    UNREGISTERED,
    FromSource,
    pack_registrations,
    take_from_source,
    take_status,
    type_of,
)

_ROOT = 0


class SourceConnection(Connection):
    """The connection of a source. `name`: empty until its first STATUS."""

    def __init__(self, listener: SourceListener, connection: socket.socket) -> None:
        super().__init__(listener, connection)
        self._sources = listener
        self.name = ""
        self.status: dict[str, Any] = {}

    def _take(self, data: bytes) -> None:
        """Handles a message. Each REQUEST and NOTICE is answered exactly once, also if it is malformed."""
        is_status = type_of(data) == STATUS
        if not is_status and not self.name:
            self._reject("STATUS comes first")
            return
        try:
            message = take_from_source(data)
            if is_status:
                self._on_status(message)
                return
        except PeerError as error:
            if is_status:
                self._reject(str(error))
            else:
                self._deny(data, error)
            return
        self._sources.serve(message, Asked(self, message.envelope.seq, message.envelope.index))

    def _deny(self, data: bytes, error: PeerError) -> None:
        """Answers a malformed message with "bad-request"; closes the connection if it has no sequence number and
        index."""
        try:
            seq, index = response_position(data)
        except PeerError:
            self._reject(str(error))
            return
        self._listener.log("request-rejected", uid=self.uid, pid=self.pid, why=error)
        Asked(self, seq, index).settle(refusal("bad-request"))

    def _reject(self, why: str) -> None:
        self._sources.log("source-rejected", uid=self.uid, pid=self.pid, why=why)
        self.close()

    def _on_status(self, message: FromSource) -> None:
        """Handles a STATUS. PeerError if it is malformed."""
        name, status = message.envelope.service, take_status(message.envelope.body)
        if not self.name:
            if name not in NOTICES:
                self.tell(pack_response(0, 0, refusal("no-service")))
                self._reject(f"a source of the name {name!r}")
                return
            if name in self._sources.connected:
                self.tell(pack_response(0, 0, refusal("duplicate")))
                self._reject(f"a source of the name {name!r} is connected")
                return
            self.name = name
            self._sources.join(self)
        elif name != self.name:
            raise PeerError("source message", "another name than before")
        self.status = status

    def tell(self, data: bytes) -> None:
        """Sends a message without blocking. Closes the connection if the source's buffer is full."""
        if self.open:
            try:
                self.socket.send(data, socket.MSG_DONTWAIT)
            except OSError:
                self._sources.log("source-lost", source=self.name, pid=self.pid, why="it does not read")
                self.close()

    def close(self) -> None:
        super().close()
        self._sources.leave(self)


class SourceListener(Listener):
    """The socket source.sock and the connected sources, by name."""

    name = "sources"
    per_person = in_all = for_root = 64
    limited = False  # only the broker's own user can connect
    idle = 5.0  # seconds, the time-out of the first STATUS

    def __init__(self, loop: Loop, router: Router, log: EventLog, people: People, path: Path) -> None:
        self.connected: dict[str, SourceConnection] = {}
        self._me, self._machine = os.geteuid(), router.machine
        super().__init__(loop, router, log, people, path)
        router.on_registered.append(functools.partial(self._say, REGISTERED))
        router.on_gone.append(functools.partial(self._say, UNREGISTERED))

    def make(self, accepted: socket.socket) -> Connection:
        return SourceConnection(self, accepted)

    def admits(self, connection: Connection) -> bool:
        return connection.uid == self._me and super().admits(connection)

    def busy(self, connection: Connection) -> bool:
        return isinstance(connection, SourceConnection) and bool(connection.name)

    def evictable(self, connection: Connection) -> bool:
        return not self.busy(connection)

    # --- messages of sources ---------------------------------------------------------------------------------

    def serve(self, message: FromSource, origin: Asked) -> None:
        """Sends a notice or a request to the daemon of its target. Settles `origin`, or has the router do it."""
        kind, target, envelope = message
        router, requester = self.router, envelope.requester
        if kind == NOTICE:
            notice = NOTICES.get(envelope.service)
            if notice is None:
                origin.settle(refusal("no-service"))
                return
            uid = self._told_for(target, notice)
            why = router.notice(uid, notice.name, requester, envelope.body)
            origin.settle(refusal(why) if why else Answer(b""))
            return
        service = router.services.get(envelope.service)
        if service is None:
            origin.settle(refusal("no-service"))
            return
        try:
            service.check_request(envelope.body)
        except PeerError:
            origin.settle(refusal("bad-request"))
            return
        deadline = envelope.deadline_ns / 1e9 or float("inf")
        line = self.people.line_of(requester.pid)
        self.router.ask(target, service.name, requester, envelope.body, origin, self.loop.now, deadline, line)

    def _told_for(self, uid: int, notice: Notice) -> int:
        """Returns the uid whose daemon gets a notice. Root's own daemon has no network: notices with `network` go to
        the machine's daemon instead."""
        return self.router.machine if uid == _ROOT and notice.network else uid

    # --- registrations ---------------------------------------------------------------------------------------

    def join(self, connection: SourceConnection) -> None:
        """Adds a source that has sent its name, and sends it the registered uids."""
        self.connected[connection.name] = connection
        self.log("source-connected", source=connection.name, pid=connection.pid)
        self._say_all(connection)

    def leave(self, connection: SourceConnection) -> None:
        """Removes a source whose connection is closed."""
        if self.connected.get(connection.name) is connection:
            del self.connected[connection.name]
            self.log("source-disconnected", source=connection.name, pid=connection.pid)

    def follow(self, owners: Mapping[str, int]) -> None:
        """Applies a reloaded configuration: sends the whole list if the machine's daemon has another uid now."""
        if self.router.machine != self._machine:
            self._machine = self.router.machine
            for connection in tuple(self.connected.values()):
                self._say_all(connection)

    def _say_all(self, connection: SourceConnection) -> None:
        uids = [uid for association in self.router.registry for uid in self._names(association.uid)]
        for data in pack_registrations(REGISTERED, uids, whole=True):
            connection.tell(data)

    def _say(self, kind: int, uid: int) -> None:
        for data in pack_registrations(kind, self._names(uid)) if self.connected else ():
            for connection in tuple(self.connected.values()):
                connection.tell(data)

    def _names(self, uid: int) -> Iterator[int]:
        """Yields the uids under which sources know a daemon: 0 for the machine's, in addition to its own; none for
        root's own."""
        if uid == self.router.machine:
            yield _ROOT
        if uid != _ROOT:
            yield uid

    def status(self, uid: int | None) -> dict[str, object]:
        """Returns the latest status of each connected source, by name. For root only: others get nothing."""
        if uid is not None:
            return {}
        said = {name: connection.status for name, connection in self.connected.items()}
        return {name: said.get(name, {}) for name in NOTICES}
