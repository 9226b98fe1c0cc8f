"""Prompts on terminals that run `upcall prompt`: the daemon's side of the connection.

The terminal's process connects to the daemon's control socket and keeps the connection. The messages are those of
upcall.wire.isolation. The daemon sends PIN, TOUCH and CLOSE (withdraws a PIN), with the text to show in `data`; `text`
of a PIN is what to type, "PIN" or "Passphrase". The terminal sends ANSWER, REFUSED (cancelled) or FAILED (it cannot
show the prompt).
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading

from upcall.core.errors import PeerError
from upcall.daemon.prompting.question import Cancelled, Question, Turn, Unanswered, Unavailable, Withdrawn, checked
from upcall.daemon.prompting.requester import plain
from upcall.process.log import EventLog
from upcall.wire.isolation import ANSWER, CLOSE, FAILED, HEAD, PIN, REFUSED, TOUCH, ChildMessage, pack, take

REPLACED = "another terminal answers prompts now"
_LATE = 16  # late answers to earlier questions that are skipped, at most
_BUFFER = HEAD.size + 4096


class _Gone(Exception):
    """The terminal has closed the connection or sent a malformed message; the text says which."""


class Agent:
    """Prompts on a terminal that runs `upcall prompt`. One at a time: a newer one takes over the open prompt."""

    name = "agent"

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._numbers = itertools.count(1)

    def attach(self, connection: socket.socket, welcome: bytes) -> None:
        """Attaches a terminal; does not block. `welcome`: the first message to send to it."""
        connection.setblocking(False)
        with self._lock:  # other threads use the connection only after the welcome was sent
            with contextlib.suppress(OSError):
                connection.send(welcome)
            before, self._connection = self._connection, connection
        if before is not None:
            with contextlib.suppress(OSError):
                before.send(pack(ChildMessage(FAILED, 0, text=REPLACED)))
                before.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for its answer, which closes it
        self._log("terminal-attached")

    def available(self) -> bool:
        with self._lock:
            return self._alive() is not None

    def _alive(self) -> socket.socket | None:
        """Returns the connection if its terminal still runs; the caller holds the lock."""
        if self._connection is not None:
            poll = select.poll()
            poll.register(self._connection, 0)
            if poll.poll(0):
                self._connection = None
        return self._connection

    def ask(self, question: Question, turn: Turn, /) -> bytearray:
        while True:
            with self._lock:
                connection = self._alive()
            if connection is None:
                raise Unavailable("no terminal is attached")
            try:
                return checked(_ask(connection, next(self._numbers), question, turn))
            except (_Gone, OSError) as error:
                self._log("terminal-gone", why=error)
                with self._lock:
                    if self._connection is connection:
                        self._connection = None

    def notify(self, question: Question, turn: Turn, /) -> bool:
        with self._lock:
            connection = self._alive()
        if connection is None:
            return False
        with contextlib.suppress(OSError):
            connection.send(pack(ChildMessage(TOUCH, 0, data=question.text().encode())))
            return True
        return False


def _ask(connection: socket.socket, number: int, question: Question, turn: Turn) -> bytearray:
    """Asks one question and waits for its answer. _Gone, OSError, and the outcomes of `Way.ask`."""
    connection.send(pack(ChildMessage(PIN, number, text=question.wanted, data=question.text().encode())))
    buffer = bytearray(_BUFFER)
    try:
        for _ in range(_LATE):
            turn.wait(connection.fileno())
            message = _receive(connection, buffer)
            if message.id != number:  # answers an earlier question, withdrawn meanwhile
                _wipe(message)
            elif message.kind == ANSWER and isinstance(message.data, bytearray):
                return message.data
            elif message.kind == REFUSED:
                raise Cancelled("the person said no")
            elif message.kind == FAILED:
                raise Unavailable(plain(message.text))
            else:
                raise _Gone(f"talks nonsense: kind {message.kind}")
        raise _Gone("talks about what it was not asked")
    except (Unanswered, Withdrawn):
        with contextlib.suppress(OSError):
            connection.send(pack(ChildMessage(CLOSE, number)))
        raise
    finally:
        buffer[:] = bytes(len(buffer))


def _receive(connection: socket.socket, buffer: bytearray) -> ChildMessage:
    size, _, flags, _ = connection.recvmsg_into([buffer])
    if not size:
        raise _Gone("closed its end")
    if flags & socket.MSG_TRUNC:
        raise _Gone("talks nonsense: a message too long")
    try:
        with memoryview(buffer)[:size] as view:
            return take(view)
    except PeerError as error:
        raise _Gone(f"talks nonsense: {error}") from None


def _wipe(message: ChildMessage) -> None:
    if isinstance(message.data, bytearray):
        message.data[:] = bytes(len(message.data))
