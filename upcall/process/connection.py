"""Sends requests to the broker, or to the user's own daemon, over an AF_UNIX connection.

The requester's side of the protocol in docs/protocol.md.
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
    """No broker listens at the expected place, or it has ended."""


class _NotTaken(ConnectionError):
    """The connection ended before the other side read the request."""


class LocalConnection:
    """Sends requests over one SOCK_SEQPACKET connection, one at a time. Not thread-safe. `path`: the socket; `owners`:
    uids that may listen there. OSError if none listens, UsageError if another uid does."""

    def __init__(self, path: Path, owners: frozenset[int]) -> None:
        self._path, self._owners = path, owners
        self._socket = connect(path, owners)
        self._seq = 0

    def ask(self, service: str, uid: int, body: bytes, timeout: float) -> bytes:
        """Sends a request and returns the answer's body. `uid`: whose daemon is asked; `timeout`: seconds. Blocks.

        Refused with the reason; TimeoutError; ConnectionError if the other side ended; PeerError if its reply is
        malformed. Connects again, once, if the other side had ended the idle connection before it read the request.
        """
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
        """Sends a request and waits for its response. _NotTaken if the other side ended without reading it."""
        self._socket.settimeout(timeout + 1)
        try:
            self._socket.send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _NotTaken(str(error)) from error
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except ConnectionResetError as error:
                # unix(7): ECONNRESET if the peer closed with unread data. The request was sent last, so it is unread.
                # If the peer has read everything, there is an end of file instead: the request is not repeated.
                raise _NotTaken(str(error)) from error
            if not data:
                raise ConnectionError("the connection was closed")
            response = take_response(data)
            if response.seq == self._seq:
                return response

    @property
    def peer(self) -> tuple[int, int]:
        """(pid, uid) of the process that listens, as the kernel reports them."""
        pid, uid, _ = ucred.of_peer(self._socket)
        return pid, uid

    def detach(self) -> socket.socket:
        """Returns the socket, blocking, for another protocol than requests. The caller must close it."""
        self._socket.settimeout(None)
        return self._socket

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


class BrokerConnection:
    """Sends requests to the broker. `uid`: whose daemon is asked, by default the caller's; only root may ask
    another's."""

    def __init__(self, folder: Path | None = None, uid: int | None = None, timeout: float = 10.0) -> None:
        """`folder`: the broker's; by default the user's own broker, otherwise the system's. `timeout`: seconds per
        request. NoBroker if none listens there."""
        self._uid = os.getuid() if uid is None else uid
        self.timeout = timeout
        place = find_place(folder)
        try:
            self._connection = LocalConnection(place.socket, frozenset({0, os.geteuid()}))
        except (OSError, UsageError) as error:
            raise NoBroker(f"no broker at {place.socket}: {error}") from error

    def ask(self, service: str, body: bytes) -> bytes:
        """Sends a request and returns the answer's body. `service`, `body`: see docs/protocol.md. Refused,
        TimeoutError, NoBroker if the broker has ended, PeerError if its reply is malformed."""
        try:
            return self._connection.ask(service, self._uid, body, self.timeout)
        except TimeoutError as error:
            raise TimeoutError(f"the broker has not answered within {self.timeout} s") from error
        except (ConnectionError, FileNotFoundError, UsageError) as error:
            raise NoBroker(f"the broker has ended: {error}") from error

    def status(self) -> dict[str, Any]:
        """Returns the broker's status: for root of all uids, for others of their own."""
        found = json.loads(self.ask("broker.status", b""))
        if not isinstance(found, dict):
            raise PeerError("status", "is not a JSON object")
        return found

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
