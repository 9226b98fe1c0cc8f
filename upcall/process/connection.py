"""Sends requests to the broker, or to the user's own daemon, over an AF_UNIX connection.

The requester's side of the protocol in docs/protocol.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from upcall.core.errors import PeerError, Refused, UpcallError, UsageError, error_words
from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel import ucred
from upcall.kernel.local import connect
from upcall.process.paths import find_place
from upcall.wire.envelope import MAX_BODY, MAX_MESSAGE, MAX_NAME, Envelope, Response, pack_request, take_response

_LONGEST: Final = 86_400.0  # seconds of a time-out
_NO_UID: Final = 2**32 - 1  # uid_t's -1


class NoBroker(UpcallError):
    """No broker listens at the expected place, or it has ended."""


class TimedOut(UpcallError, TimeoutError):
    """The broker did not answer in time. A daemon that did not is Refused("timed-out")."""


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
        envelope = Envelope(self._seq, 0, service, requester, int(deadline * 1e9), body, wants_why=True)
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
        raise refused_by_daemon(response.outcome)

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


def check_timeout(timeout: object) -> float:
    """Returns a time-out in seconds. UsageError unless it is a number above 0, and a day at most."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= _LONGEST:
        raise UsageError(
            f"a time-out of {_short(timeout)}: a number of seconds above 0, at most {_LONGEST:.0f}, is needed"
        )
    return float(timeout)


def check_uid(uid: object) -> int:
    """Returns the uid, by default (None) the caller's. UsageError unless it is one."""
    if uid is None:
        return os.getuid()
    if isinstance(uid, bool) or not isinstance(uid, int) or not 0 <= uid < _NO_UID:
        raise UsageError(f"{_short(uid)} is not a uid: a number from 0 to {_NO_UID - 1} is needed")
    return uid


def find_broker(folder: object) -> Path:
    """Returns the socket of the broker in `folder` (text, a path, or None: see paths.find_place). UsageError if
    `folder` is neither; NoBroker if there is no place to look at."""
    try:
        if folder is not None:
            text = os.fspath(folder)  # type: ignore[call-overload]  # TypeError is the answer
            if not isinstance(text, str) or not text or "\0" in text:
                raise UsageError(f"{_short(folder)} is not a folder: a text without NUL, or a path, is needed")
            folder = Path(text)
        return find_place(folder).socket
    except TypeError:
        raise UsageError(f"a folder of type {type(folder).__name__}: a text or a path is needed") from None
    except OSError as error:
        raise NoBroker(f"no broker: {error_words(error)}") from error


def connect_to_broker(path: Path, wait: bool = True) -> socket.socket:
    """Connects to the broker of root or of the caller at `path`. NoBroker; BlockingIOError if its backlog is full.
    `wait`: see kernel.local.connect."""
    try:
        return connect(path, _owners(), wait)
    except BlockingIOError:
        raise
    except (OSError, UsageError, ValueError) as error:  # ValueError: a path that the file system cannot name
        raise NoBroker(f"no broker at {path}: {error_words(error)}") from error


def check_request(service: object, body: object) -> tuple[str, bytes]:
    """Returns the name of the service and the body, as bytes. UsageError unless a message can carry them."""
    if not isinstance(service, str) or not service.isascii() or not 1 <= len(service) <= MAX_NAME:
        raise UsageError(f"{_short(service)} is not a service: 1 to {MAX_NAME} ASCII characters are needed")
    return service, check_bytes(body, "the body", 0, MAX_BODY)


def check_bytes(data: object, what: str, least: int, most: int) -> bytes:
    """Returns a copy of bytes, a bytearray or a memoryview. UsageError on other types, or if there are not `least` to
    `most` bytes. `what`: the name of the argument, for the error, which contains nothing of `data`."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"{what} must be bytes, not {type(data).__name__}")
    try:
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if least <= size <= most:
            return bytes(data)
    except ValueError:
        raise UsageError(f"{what} is a memoryview that was released") from None
    raise UsageError(f"{what} has {size} bytes, {least} to {most} are possible")


def refused_by_daemon(outcome: Refusal) -> Refused:
    """Returns the exception for a refusal. Its `why`, if any, is the daemon's: the broker sends none of its own."""
    refused = Refused(*outcome)
    refused.by = "the daemon"
    return refused


def take_status(body: bytes) -> dict[str, Any]:
    """Parses the broker's answer to `broker.status`. PeerError if it is malformed."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise PeerError("status", "is not JSON") from None
    if not isinstance(found, dict):
        raise PeerError("status", "is not a JSON object")
    return found


def _owners() -> frozenset[int]:
    return frozenset({0, os.geteuid()})


def _short(value: object) -> str:
    """Returns a wrong argument for an error: numbers and short texts as they are, of others the type."""
    shown = repr(value) if isinstance(value, str | int | float) else f"something of type {type(value).__name__}"
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


class BrokerConnection:
    """Sends requests to the broker, one at a time. Raises UpcallError only. Thread-safe: threads take turns. After a
    fork, the child makes a new connection."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, uid: int | None = None, timeout: float = 10.0
    ) -> None:
        """`folder`: the broker's; by default the user's own broker, otherwise the system's. `uid`: whose daemon is
        asked, by default the caller's; only root may ask another's. `timeout`: seconds per request, up to a day.
        NoBroker if none listens there; UsageError on other arguments than these."""
        self._uid = check_uid(uid)
        self.timeout = check_timeout(timeout)
        self._path = find_broker(folder)
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._pid, self._turn = os.getpid(), threading.Lock()
        try:
            self._connection = LocalConnection(self._path, _owners())
        except (OSError, UsageError, ValueError) as error:
            raise NoBroker(f"no broker at {self._path}: {error_words(error)}") from error

    def ask(self, service: str, body: bytes) -> bytes:
        """Sends a request and returns the answer's body. `service`, `body`: see docs/protocol.md. Blocks for at most a
        second longer than the time-out, which begins with the thread's turn.

        Refused; TimedOut; NoBroker if the broker has ended; PeerError if its reply is malformed; UsageError on other
        arguments than these, and if the connection is closed."""
        timeout = check_timeout(self.timeout)
        service, body = check_request(service, body)
        if self._pid != os.getpid() and not self._closed:
            self._connection.close()  # the parent's: replies to both would be mixed up
            self._open()
        with self._turn:
            if self._closed:
                raise UsageError("the connection to the broker is closed: make another client")
            try:
                return self._connection.ask(service, self._uid, body, timeout)
            except TimeoutError as error:
                raise TimedOut(f"the broker has not answered within {timeout:g} s") from error
            except (OSError, UsageError) as error:
                raise NoBroker(f"the broker has ended: {error_words(error)}") from error

    def status(self) -> dict[str, Any]:
        """Returns the broker's status: for root of all uids, for others of their own. Errors as `ask`."""
        return take_status(self.ask("broker.status", b""))

    def close(self) -> None:
        """Closes the connection, after the request that another thread is waiting for. May be repeated."""
        with self._turn if self._pid == os.getpid() else contextlib.nullcontext():
            self._closed = True
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
