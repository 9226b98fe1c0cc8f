"""Sends requests to the caller's daemon from asyncio, many at a time over one connection: docs/python.md.

async with AsyncClient() as client:
    wrapped = await client.wrap("default", key)

Replies are matched to requests by their sequence numbers. A request that is cancelled or timed out counts as one of
the concurrent ones until its reply arrives, which is dropped: the broker uses a message context for it until then.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from upcall.client import SERVICE, naming, signature_of, unwrapping, wrapping
from upcall.core.errors import PeerError, UpcallError, UsageError, error_words
from upcall.core.messages import Answer, Refusal, Requester
from upcall.process.connection import (
    NoBroker,
    TimedOut,
    check_request,
    check_timeout,
    check_uid,
    connect_to_broker,
    find_broker,
    refused_by_daemon,
    take_status,
)
from upcall.protocols.ecryptfs.packets import is_signature, take_file_key, take_reply
from upcall.wire.envelope import MAX_MESSAGE, Envelope, pack_request, take_response

MOST_CONCURRENT: Final = 32  # requests: the broker has as many message contexts per uid and service
_GRACE: Final = 1.0  # seconds: the broker refuses an overdue request itself, with the reason
_BACKLOG_PAUSE: Final = 0.01  # seconds


class _Unread(UpcallError):
    """The connection ended before the broker read the request, which can be sent again."""


class _Connection:
    """One SOCK_SEQPACKET connection, used by the event loop in which it is made. `slots`: released once for each
    request that `send` was given, when it was answered or the connection ends.

    asyncio's loop.sock_* would not do: two of its sends at a time replace each other's callbacks, and it takes the
    EAGAIN of a full backlog for a connection in progress."""

    def __init__(self, connected: socket.socket, slots: asyncio.Semaphore) -> None:
        connected.setblocking(False)
        self._socket, self._slots, self._loop = connected, slots, asyncio.get_running_loop()
        self._seq = 0
        self._waiting: dict[int, asyncio.Future[Answer | Refusal]] = {}  # by seq; also cancelled ones
        self._unsent: deque[tuple[int, bytes]] = deque()
        self.open = True
        self._loop.add_reader(self._socket, self._on_readable)

    def send(self, service: str, uid: int, body: bytes, deadline: float) -> asyncio.Future[Answer | Refusal]:
        """Sends a request, at once or when there is room. Returns the future of its outcome, _Unread, NoBroker or
        PeerError if the connection ends. `deadline`: seconds of CLOCK_MONOTONIC."""
        if not self._waiting:
            self._on_readable()  # the broker ends idle connections
        future: asyncio.Future[Answer | Refusal] = self._loop.create_future()
        if not self.open:
            self._slots.release()
            future.set_exception(_Unread())
            return future
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        self._waiting[seq] = future
        future.add_done_callback(lambda done: self._forget_unsent(seq) if done.cancelled() else None)
        envelope = Envelope(seq, 0, service, Requester(uid, os.getpid()), int(deadline * 1e9), body, wants_why=True)
        self._unsent.append((seq, pack_request(envelope)))
        if len(self._unsent) == 1:
            self._on_writable()
        return future

    def _forget_unsent(self, seq: int) -> None:
        """Takes a cancelled request out of the queue, if it is still there."""
        kept = [one for one in self._unsent if one[0] != seq]
        if len(kept) < len(self._unsent):
            self._unsent = deque(kept)
            self._take_out(seq)

    def _take_out(self, seq: int) -> asyncio.Future[Answer | Refusal] | None:
        """Ends the wait for a reply. Returns its future; None if no request with this number is waiting."""
        future = self._waiting.pop(seq, None)
        if future is not None:
            self._slots.release()
        return future

    def _on_writable(self) -> None:
        while self._unsent:
            try:
                self._socket.send(self._unsent[0][1])
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._on_writable)
                return
            except OSError as error:
                self._on_readable()  # replies that came before the end
                self._end(error)
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        while self.open:
            try:
                data = self._socket.recv(MAX_MESSAGE)
                if not data:
                    raise ConnectionAbortedError("the connection was closed")
                response = take_response(data)
            except BlockingIOError:
                return
            except (OSError, PeerError) as error:
                self._end(error)
                return
            future = self._take_out(response.seq)
            if future is not None and not future.done():
                future.set_result(response.outcome)

    def _end(self, error: OSError | PeerError) -> None:
        if not self.open:
            return
        unread = {seq for seq, _ in self._unsent}
        if isinstance(error, ConnectionResetError) and len(self._waiting) == len(unread) + 1:
            unread = set(self._waiting)  # unix(7): the peer has closed with unread data, of the only request sent
        self.close(unread, lambda: _as_upcall_error(error))

    def close(self, unread: set[int], error: Callable[[], UpcallError]) -> None:
        """Closes the connection. May be repeated. Waiting requests fail: those in `unread` by _Unread, the others by
        `error`."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._unsent.clear()
        for seq in list(self._waiting):
            future = self._take_out(seq)
            if future is not None and not future.done():
                future.set_exception(_Unread() if seq in unread else error())


def _as_upcall_error(error: OSError | PeerError) -> UpcallError:
    """Returns a new error for each request, because each gets a traceback of its own."""
    if isinstance(error, PeerError):
        return PeerError(error.what, error.why, error.where)
    return NoBroker(f"the broker has ended: {error_words(error)}")


class AsyncClient:
    """Client for asyncio. Its methods may run concurrently, in tasks of one event loop. Raises UpcallError only."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        uid: int | None = None,
        timeout: float = 10.0,
        *,
        concurrent: int = MOST_CONCURRENT // 2,
    ) -> None:
        """`folder`, `uid`, `timeout`: see Client. `concurrent`: requests at a time, 1 to 32; others wait for their
        turn, within their time-out. The broker's limit is 32 for all processes of a uid. NoBroker, UsageError."""
        self._uid, self._path = check_uid(uid), find_broker(folder)
        self.timeout = check_timeout(timeout)
        if isinstance(concurrent, bool) or not isinstance(concurrent, int) or not 1 <= concurrent <= MOST_CONCURRENT:
            raise UsageError(f"'concurrent' must be a number from 1 to {MOST_CONCURRENT}")
        self._slots, self._connecting = asyncio.Semaphore(concurrent), asyncio.Lock()
        self._connection: _Connection | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None  # process and loop of the first use
        self._closed = False

    async def wrap(self, key: str, data: bytes | bytearray | memoryview) -> bytes:
        """Wraps `data` (1 to 64 bytes) with the key of this name or signature. As Client.wrap."""
        with naming(key):
            return take_reply(await self.ask(SERVICE, wrapping(await self._signature(key), data))).content

    async def unwrap(self, key: str, wrapped: bytes | bytearray | memoryview) -> bytes:
        """Unwraps what `wrap` returned; returns the data. As Client.unwrap."""
        with naming(key):
            answer = await self.ask(SERVICE, unwrapping(await self._signature(key), wrapped))
        return take_file_key(take_reply(answer).content).key

    async def status(self) -> dict[str, Any]:
        """Returns the broker's status: for root of all uids, for others of their own. Errors as `ask`."""
        return take_status(await self.ask("broker.status", b""))

    async def ask(self, service: str, body: bytes) -> bytes:
        """Sends a request and returns the answer's body. Waits for at most a second longer than the time-out, which
        includes the wait for a turn. Errors as Client.ask. Connects again if the broker ended the idle connection."""
        timeout = check_timeout(self.timeout)
        service, body = check_request(service, body)
        self._check_home()
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout) as limit:
                try:
                    outcome = await self._exchange(service, body, deadline, limit)
                except _Unread:
                    outcome = await self._exchange(service, body, deadline, limit)
        except TimeoutError as error:
            raise TimedOut(f"the broker has not answered within {timeout:g} s") from error
        except _Unread as error:
            raise NoBroker("the broker ends every connection before it reads a request") from error
        if isinstance(outcome, Answer):
            return outcome.body
        raise refused_by_daemon(outcome)

    async def _exchange(self, service: str, body: bytes, deadline: float, limit: asyncio.Timeout) -> Answer | Refusal:
        """Sends the request when it is its turn, and waits for the outcome. _Unread; others as `ask`."""
        await self._slots.acquire()
        try:
            connection = await self._connected()
        except BaseException:
            self._slots.release()
            raise
        limit.reschedule(asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic()) + _GRACE)
        return await connection.send(service, self._uid, body, deadline)  # it releases the slot

    async def _connected(self) -> _Connection:
        """Returns the connection, a new one if it has ended. NoBroker; UsageError if the client is closed."""
        async with self._connecting:
            while self._connection is None or not self._connection.open:
                self._check_home()
                try:
                    self._connection = _Connection(connect_to_broker(self._path, wait=False), self._slots)
                except BlockingIOError:
                    await asyncio.sleep(_BACKLOG_PAUSE)
            return self._connection

    async def _signature(self, key: str) -> str:
        if isinstance(key, str) and is_signature(key):
            return key
        timeout = check_timeout(self.timeout)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.to_thread(signature_of, key)
        except TimeoutError as error:
            raise TimedOut(f"the key store was not read within {timeout:g} s") from error

    def _check_home(self) -> None:
        """UsageError if the client is closed, or used in another process or event loop than before."""
        home = os.getpid(), asyncio.get_running_loop()
        self._home = self._home or home
        if self._closed:
            raise UsageError("the client is closed: make another one")
        if self._home != home:
            raise UsageError("the client belongs to another event loop: make another one")

    async def close(self) -> None:
        """Closes the connection. Requests that wait fail with UsageError. May be repeated."""
        self._closed = True
        if self._connection is not None and self._home == (os.getpid(), asyncio.get_running_loop()):
            self._connection.close(set(), lambda: UsageError("the client was closed"))

    async def __aenter__(self) -> Self:
        """NoBroker if there is none; TimedOut if its backlog stays full."""
        self._check_home()
        try:
            async with asyncio.timeout(check_timeout(self.timeout)):
                await self._connected()
        except TimeoutError as error:
            raise TimedOut("the broker does not accept connections") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
