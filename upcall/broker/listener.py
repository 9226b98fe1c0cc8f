"""A listening socket of the broker, and who is connected to it: each asks, and is answered on the same connection."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from upcall.broker.loop import LISTENER
from upcall.contexts import Line
from upcall.errors import PeerError
from upcall.kernel.local import listen, peer_of, receive, unlink_quietly
from upcall.messages import Answer, Refusal
from upcall.wire.netlink import Envelope, pack_response, refusal, response_position, take_request

if TYPE_CHECKING:
    from upcall.broker.server import Server

_ACCEPTS_PER_TURN, _ACCEPT_PAUSE = 8, 0.1


class Connection:
    """One who asks. What it sends is answered on the same connection, by its own seq and index."""

    def __init__(self, listener: Listener, connection: socket.socket) -> None:
        self._listener, self.socket = listener, connection
        self.pid, self.uid = peer_of(connection)
        self._line: Line | None = None
        self.open = True

    @property
    def line(self) -> Line:
        """From whom the other side descends: as it was at the first request, for a peer never changes."""
        if self._line is None:
            self._line = self._listener.server.line_of(self.pid)
        return self._line

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
        origin = Asked(self, seq, index)
        try:
            envelope = take_request(data)
        except PeerError as error:
            self._listener.server.log("bad-request", uid=self.uid, pid=self.pid, why=error)
            origin.settle(refusal("bad-request"))
            return
        self._listener.ask(self, envelope, origin)

    def send(self, data: bytes) -> None:
        """An answer. Who does not read loses the connection: nobody waits for it."""
        if not self.open:
            return
        try:
            self.socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            self.close()
        if self._listener.once:
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._listener.forget(self)
            self.socket.close()


class Asked:
    """One request of a connection: takes the outcome and sends it."""

    __slots__ = ("_connection", "_index", "_seq")

    def __init__(self, connection: Connection, seq: int, index: int) -> None:
        self._connection, self._seq, self._index = connection, seq, index

    def settle(self, outcome: Answer | Refusal) -> None:
        self._connection.send(pack_response(self._seq, self._index, outcome))


class Listener:
    """The socket at `path`. What is asked there is the affair of those who inherit this."""

    mode = 0o600
    per_uid, in_all = 64, 1024  # connections
    once = False  # each connection asks one thing, and is closed with the answer

    def __init__(self, server: Server, path: Path) -> None:
        """UsageError if a broker listens there already."""
        self.server, self._path = server, path
        self._listener = listen(path, self.mode)
        self._connections: set[Connection] = set()
        self._by_uid: Counter[int] = Counter()
        server.loop.add(self._listener, self._on_connect, LISTENER)

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        """Sees to it that the origin is settled."""
        raise NotImplementedError

    def connection(self, accepted: socket.socket) -> Connection:
        """What is made of somebody who has connected."""
        return Connection(self, accepted)

    def admits(self, connection: Connection) -> bool:
        return self._by_uid[connection.uid] < self.per_uid and len(self._connections) < self.in_all

    def owner(self, connection: Connection) -> int:
        """On whose account the connection is served."""
        return connection.uid

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
            connection = self.connection(accepted)
            if not self.admits(connection):
                self.server.log("connection-refused", socket=self._path.name, uid=connection.uid, pid=connection.pid)
                accepted.close()
                continue
            self._connections.add(connection)
            self._by_uid[connection.uid] += 1
            self.server.loop.add(accepted, connection.on_readable, self.owner(connection))

    def forget(self, connection: Connection) -> None:
        self.server.loop.remove(connection.socket)
        self._connections.discard(connection)
        self._by_uid[connection.uid] -= 1
        if not self._by_uid[connection.uid]:
            del self._by_uid[connection.uid]

    def close(self) -> None:
        for connection in tuple(self._connections):
            connection.close()
        self.server.loop.remove(self._listener)
        self._listener.close()
        unlink_quietly(self._path)
