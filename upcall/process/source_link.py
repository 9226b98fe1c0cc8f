"""Connects a source in a process of its own to the broker: upcall/wire/source_link.py over source.sock.

Reconnects with back-off whenever the connection ends. All methods run in the loop's thread and do not block. Times are
seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple, Protocol

from upcall.core.errors import REASONS, PeerError, UsageError, error_words
from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel.local import connect, receive
from upcall.process.loop import URGENT, Loop
from upcall.process.paths import Place
from upcall.wire.envelope import NOTICE, REQUEST, Envelope, Response
from upcall.wire.source_link import (
    REGISTERED,
    FromSource,
    Registrations,
    pack_from_source,
    pack_status,
    take_to_source,
)

LOST: Final = Refusal("broker-gone", REASONS["daemon-gone"])  # the connection ended before the broker answered

_FIRST_AGAIN, _LAST_AGAIN = 0.1, 1.0  # seconds of back-off between attempts to connect, doubled each time
_STATUS_AFTER: Final = 0.1  # seconds from a change to the STATUS that reports it
_AT_ONCE: Final = 64  # messages received in a turn

Settle = Callable[[Answer | Refusal], None]


class User(Protocol):
    """The source's callbacks. All are called in the loop's thread and must not block."""

    def status(self) -> Mapping[str, object]:
        """Returns the source's status for `upcall status`, as plain data; at most MAX_STATUS bytes as JSON."""

    def on_connected(self) -> None:
        """Called when the broker has accepted the source. `on_registered` follows."""

    def on_registered(self, uids: Collection[int], /) -> None:
        """Called when daemons of these uids have registered. Uid 0 stands for the machine's daemon."""

    def on_refused(self, reason: str, /) -> None:
        """Called when the broker refuses the source: "duplicate" (one of this name is connected) or "no-service" (the
        broker does not know it)."""


class _Pending(NamedTuple):
    settle: Settle
    deadline: float


class SourceLink:
    """The connection to the broker, made when the loop runs. `name`: the source's. `registered`: uids with a daemon,
    empty while not connected."""

    def __init__(self, loop: Loop, place: Place, name: str, log: Callable[..., None], user: User) -> None:
        self._loop, self._path, self._owners, self._name = loop, place.source_socket, place.owners(), name
        self._log, self._user = log, user
        self.registered: set[int] = set()
        self.connected = False  # the broker has answered STATUS
        self._closed = False
        self._socket: socket.socket | None = None
        self._pending: dict[int, _Pending] = {}
        self._seq = 0
        self._said: Mapping[str, object] | None = None
        self._why = ""
        self._again = _FIRST_AGAIN
        self._connecting = loop.timer(self._connect)
        self._telling = loop.timer(self._tell)
        self._expiring = loop.timer(self._expire)
        self._connecting.at(time.monotonic())

    @property
    def lives(self) -> bool:
        """Whether there is a connection, accepted by the broker or about to be."""
        return self._socket is not None

    # --- sending ---------------------------------------------------------------------------------------------

    def notice(self, uid: int, service: str, requester: Requester, body: bytes, settle: Settle) -> bool:
        """Sends a notice for the daemon of `uid`. Returns False, without calling `settle`, if it cannot be sent now.

        Otherwise `settle` is called once with an Answer (it is in the daemon's socket), a Refusal such as "no-daemon"
        or "daemon-full", or LOST. PeerError if the body is too long.
        """
        return self._send(NOTICE, uid, Envelope(0, 0, service, requester, 0, body), settle, math.inf)

    def ask(
        self, uid: int, service: str, requester: Requester, body: bytes, settle: Settle, deadline: float
    ) -> bool:  # fmt: skip
        """Sends a request for the daemon of `uid`. Returns False as `notice` does. Otherwise `settle` is called once,
        at `deadline` at the latest."""
        envelope = Envelope(0, 0, service, requester, int(deadline * 1e9), body)
        return self._send(REQUEST, uid, envelope, settle, deadline)

    def changed(self) -> None:
        """Schedules a STATUS, because the source's status has changed."""
        self._telling.at(time.monotonic() + _STATUS_AFTER)

    def _send(self, kind: int, uid: int, envelope: Envelope, settle: Settle, deadline: float) -> bool:
        if self._socket is None or not self.connected:
            return False
        seq = self._seq = (self._seq + 1) & 0xFFFFFFFF
        data = pack_from_source(FromSource(kind, uid, envelope._replace(seq=seq)))
        try:
            self._socket.send(data)
        except BlockingIOError:
            return False
        except OSError:
            return False  # `_on_readable` handles the end, after the answers that came before it
        self._pending[seq] = _Pending(settle, deadline)
        self._expiring.at(deadline)
        return True

    def _tell(self, now: float) -> None:
        """Sends the status if it has changed since it was last sent."""
        status = self._user.status()
        if self._socket is None or status == self._said:
            return
        try:
            self._socket.send(pack_status(self._name, 0, status))
        except BlockingIOError:
            self._telling.at(now + _STATUS_AFTER)
        except (OSError, PeerError) as error:
            self._log("status-send-failed", why=error)
        else:
            self._said = status

    # --- receiving -------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        for _ in range(_AT_ONCE):
            if self._socket is None:
                return
            try:
                data = receive(self._socket)
            except ConnectionResetError:
                continue  # once, for messages that the broker did not read; those that it sent can be received
            except OSError as error:
                self._lose(error_words(error))
                return
            if data is None:
                return
            if not data:
                self._lose("the broker has closed the connection")
                return
            try:
                self._take(take_to_source(data))
            except PeerError as error:
                self._lose(error_words(error))

    def _take(self, message: Response | Registrations) -> None:
        if isinstance(message, Registrations):
            self._on_registrations(message)
            return
        pending = self._pending.pop(message.seq, None)
        if pending is not None:
            pending.settle(message.outcome)
        elif not self.connected and isinstance(message.outcome, Refusal):
            self._lose(f"the broker refuses this source: {message.outcome.reason}")
            self._user.on_refused(message.outcome.reason)

    def _on_registrations(self, message: Registrations) -> None:
        if message.kind != REGISTERED:
            self.registered.difference_update(message.uids)
            return
        if message.whole:
            self.registered.clear()
        self.registered.update(message.uids)
        if not self.connected:
            self.connected, self._why, self._again = True, "", _FIRST_AGAIN
            self._log("broker-connected")
            self._user.on_connected()
        self._user.on_registered(message.uids)

    # --- the connection --------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        if self._closed:
            return
        try:
            self._socket = connect(self._path, self._owners, wait=False)
        except (OSError, UsageError) as error:
            self._not_now(now, error_words(error))
            return
        self._said = None
        self._loop.add(self._socket, self._on_readable, URGENT)
        self._tell(now)

    def _lose(self, why: str) -> None:
        if self._socket is None:
            return
        self._loop.remove(self._socket)
        self._socket.close()
        self._socket, self.connected = None, False
        self.registered.clear()
        pending, self._pending = self._pending, {}
        self._not_now(time.monotonic(), why)
        for one in reversed(pending.values()):  # so that a caller that prepends each to a queue keeps the order
            one.settle(LOST)

    def _not_now(self, now: float, why: str) -> None:
        if why != self._why:
            self._log("broker-connect-failed", why=why)
        self._why = why
        self._connecting.at(now + self._again)
        self._again = min(2 * self._again, _LAST_AGAIN)

    def _expire(self, now: float) -> None:
        for seq, pending in tuple(self._pending.items()):
            if pending.deadline <= now:
                del self._pending[seq]
                pending.settle(Refusal("timed-out", REASONS["timed-out"]))
            else:
                self._expiring.at(pending.deadline)

    def close(self) -> None:
        """Closes the connection for good. Pending messages are not settled."""
        self._closed = True
        if self._socket is not None:
            self._loop.remove(self._socket)
            self._socket.close()
            self._socket, self.connected = None, False
