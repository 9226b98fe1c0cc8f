"""Requests to the broker, or to one's own daemon, over an AF_UNIX connection: the requester's side of the link.

Source: docs/protocol.md.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from upcall.core.errors import PeerError, Refused, UpcallError, UsageError
from upcall.core.messages import Answer, Requester
from upcall.kernel import ucred
from upcall.kernel.local import connect
from upcall.process.paths import find_place
from upcall.wire.envelope import MAX_MESSAGE, Envelope, Response, pack_request, take_response


class NoBroker(UpcallError):
    """There is no broker where we looked, or it has gone."""


class _NotTaken(ConnectionError):
    """The connection ended before the other side has taken the request."""


class LocalConnection:
    """Requests over one SOCK_SEQPACKET connection, one after the other. Not for several threads at a time."""

    def __init__(self, path: Path, owners: frozenset[int]) -> None:
        self._path, self._owners = path, owners
        self._socket = connect(path, owners)
        self._seq = 0

    def ask(self, service: str, uid: int, body: bytes, timeout: float) -> bytes:
        """The answer's body. Refused with the reason; TimeoutError; ConnectionError if the other side went.

        A connection that the other side has ended because it was idle is made again, once."""
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        deadline = time.monotonic() + timeout
        requester = Requester(uid, os.getpid())
        envelope = Envelope(self._seq, 0, service, requester, int(deadline * 1e9), body)
        data = pack_request(envelope)
        try:
            response = self._exchange(data, timeout)
        except _NotTaken:
            again = connect(self._path, self._owners)
            self._socket.close()
            self._socket = again
            response = self._exchange(data, timeout)
        if isinstance(response.outcome, Answer):
            return response.outcome.body
        raise Refused(response.outcome.reason, response.outcome.errno)

    def _exchange(self, request: bytes, timeout: float) -> Response:
        """Sends it, and waits for its response. _NotTaken if the other side had gone without reading it."""
        self._socket.settimeout(timeout + 1)
        try:
            self._socket.send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _NotTaken(str(error)) from error
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except ConnectionResetError as error:
                # unix(7): ECONNRESET if the peer closed with unread data. The request was sent last, so it is among
                # them; a peer that has taken everything gives the end of file, and is not asked again.
                raise _NotTaken(str(error)) from error
            if not data:
                raise ConnectionError("the connection was closed")
            response = take_response(data)
            if response.seq == self._seq:
                return response

    @property
    def peer(self) -> tuple[int, int]:
        """(pid, uid) of whoever listens there."""
        pid, uid, _ = ucred.of_peer(self._socket)
        return pid, uid

    def detach(self) -> socket.socket:
        """The connection itself, for whoever has something else to say on it; blocking."""
        self._socket.settimeout(None)
        return self._socket

    def close(self) -> None:
        self._socket.close()


class BrokerConnection:
    """Requests to the broker. `uid`: whose daemon is asked, one's own if not given; only root may ask another's."""

    def __init__(self, folder: Path | None = None, uid: int | None = None, timeout: float = 10.0) -> None:
        """NoBroker if there is none in `folder` (or in the usual places)."""
        self._uid = os.getuid() if uid is None else uid
        self.timeout = timeout
        place = find_place(folder)
        try:
            self._connection = LocalConnection(place.socket, frozenset({0, os.geteuid()}))
        except (OSError, UsageError) as error:
            raise NoBroker(f"no broker at {place.socket}: {error}") from error

    def ask(self, service: str, body: bytes) -> bytes:
        """Any service by its name. Refused, TimeoutError, NoBroker if it has gone, PeerError if it talks nonsense."""
        try:
            return self._connection.ask(service, self._uid, body, self.timeout)
        except TimeoutError as error:
            raise TimeoutError(f"the broker has not answered within {self.timeout} s") from error
        except (ConnectionError, FileNotFoundError, UsageError) as error:
            raise NoBroker(f"the broker has gone: {error}") from error

    def status(self) -> dict[str, Any]:
        """The broker's view of itself: for root of everybody, for others of themselves."""
        found = json.loads(self.ask("broker.status", b""))
        if not isinstance(found, dict):
            raise PeerError("status", "is not a JSON object")
        return found

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
