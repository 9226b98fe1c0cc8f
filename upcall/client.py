"""Sends requests to the caller's daemon through the broker, as the kernel does.

with Client() as client:
    wrapped = client.wrap(signature, key)
    assert client.unwrap(signature, wrapped) == key
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
from upcall.kernel.local import connect, peer_of
from upcall.process.paths import find_place
from upcall.protocols.ecryptfs.packets import (
    CIPHER_OPAQUE,
    MAX_KEY,
    TAG_64,
    TAG_66,
    Ask,
    FileKey,
    is_signature,
    pack_ask,
    pack_file_key,
    take_file_key,
    take_reply,
)
from upcall.wire.envelope import MAX_MESSAGE, Envelope, Response, pack_request, take_response


class NoBroker(UpcallError):
    """No broker listens in the folder, or it has ended."""


class _NotTaken(ConnectionError):
    """The connection ended before the peer read the request."""


class Connection:
    """Sends requests over one SOCK_SEQPACKET connection, one at a time. Not thread-safe.

    `owners`: uids that may own the socket's path; UsageError if another one does. OSError if it cannot be reached.
    """

    def __init__(self, path: Path, owners: frozenset[int]) -> None:
        self._path, self._owners = path, owners
        self._socket = connect(path, owners)
        self._seq = 0

    def ask(self, service: str, uid: int, body: bytes, timeout: float) -> bytes:
        """Sends one request and returns the answer's body. Blocks for up to `timeout` seconds, and one more.

        `uid`: whose daemon is asked. `body`: in the service's format (docs/protocol.md). Refused with the reason;
        TimeoutError; ConnectionError if the peer has gone; PeerError if its response is malformed. Reconnects once
        if the peer had closed the idle connection."""
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
        """Sends a request and waits for its response. _NotTaken if the peer closed without reading the request."""
        self._socket.settimeout(timeout + 1)
        try:
            self._socket.send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _NotTaken(str(error)) from error
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except ConnectionResetError as error:
                # unix(7): ECONNRESET if the peer closed with unread data. The request was sent last, so it is unread
                # and may be sent again. A peer that has read it causes an end of file: never send twice.
                raise _NotTaken(str(error)) from error
            if not data:
                raise ConnectionError("the connection was closed")
            response = take_response(data)
            if response.seq == self._seq:
                return response

    @property
    def peer(self) -> tuple[int, int]:
        """(pid, uid) of the listening process, as the kernel reports them (SO_PEERCRED)."""
        return peer_of(self._socket)

    def detach(self) -> socket.socket:
        """Returns the connected socket, made blocking, to speak another protocol on it. The caller closes it."""
        self._socket.settimeout(None)
        return self._socket

    def close(self) -> None:
        self._socket.close()


class Client:
    """Asks a daemon for key operations and other services. Not thread-safe: use one per thread. A context manager.

    `uid`: whose daemon is asked; the caller's by default, another's for root only. `timeout`: seconds per request.
    """

    def __init__(self, folder: Path | None = None, uid: int | None = None, timeout: float = 10.0) -> None:
        """Connects to the broker in `folder`, by default in the usual places. NoBroker if none listens there."""
        self._uid = os.getuid() if uid is None else uid
        self.timeout = timeout
        place = find_place(folder)
        try:
            self._connection = Connection(place.socket, frozenset({0, os.geteuid()}))
        except (OSError, UsageError) as error:
            raise NoBroker(f"no broker at {place.socket}: {error}") from error

    def wrap(self, signature: str, key: bytes) -> bytes:
        """Wraps `key` (1 to 64 bytes) with the key of this signature (16 hexadecimal digits). Returns the wrapped key.

        UsageError on other sizes; otherwise as `ask`."""
        if not 1 <= len(key) <= MAX_KEY:
            raise UsageError(f"a key of {len(key)} bytes, 1 to {MAX_KEY} can be wrapped")
        return self._packet(TAG_66, signature, pack_file_key(FileKey(CIPHER_OPAQUE, key)))

    def unwrap(self, signature: str, wrapped: bytes) -> bytes:
        """Returns the key that `wrap` was given. Refused("module-failed") if another key wrapped it; as `ask`."""
        return take_file_key(self._packet(TAG_64, signature, wrapped)).key

    def _packet(self, tag: int, signature: str, content: bytes) -> bytes:
        if not is_signature(signature):
            raise UsageError(f"signature {signature!r} is not 16 hexadecimal digits")
        body = pack_ask(Ask(tag, signature, content))
        return take_reply(self.ask("key", body)).content

    def ask(self, service: str, body: bytes) -> bytes:
        """Sends a request for any service and returns the answer's body; formats: docs/protocol.md. Blocks.

        Refused with reason and errno; TimeoutError; NoBroker if the broker has ended; PeerError if its response is
        malformed."""
        try:
            return self._connection.ask(service, self._uid, body, self.timeout)
        except TimeoutError as error:
            raise TimeoutError(f"the broker has not answered within {self.timeout} s") from error
        except (ConnectionError, FileNotFoundError, UsageError) as error:
            raise NoBroker(f"the broker has gone: {error}") from error

    def status(self) -> dict[str, Any]:
        """Returns the broker's status as a JSON object: of all uids for root, of the caller's uid for others."""
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
