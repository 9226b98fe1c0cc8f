"""Accepts connections at a socket of the broker, limits them per person, and passes their requests on.

Admission: connections are limited per person (the owner of a range of subordinate uids, upcall/process/people.py) and
in all. At a limit, a new connection replaces the longest idle one of the person who has most. Root's connections have
room of their own and are never evicted. Idle connections end after `idle` seconds. New connections are rate-limited
per person.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path

from upcall.core.contexts import Line
from upcall.core.errors import PeerError
from upcall.core.messages import Answer, Refusal
from upcall.core.router import Router
from upcall.kernel import ucred
from upcall.kernel.local import (
    carries_rights,
    discard,
    listen,
    receive,
    takes_no_rights,
    unlink_quietly,
)
from upcall.process.closer import Closer
from upcall.process.log import EventLog
from upcall.process.loop import LISTENER, Loop
from upcall.process.people import People
from upcall.process.source import Source
from upcall.wire.envelope import Envelope, pack_response, refusal, response_position, take_request

_ACCEPTS_PER_TURN, _ACCEPTING, _ACCEPT_PAUSE = 64, 0.00002, 0.1  # connections; seconds
# A new connection costs up to 0.2 ms, so each person has a rate limit. Connections above it are closed at once, which
# costs 15 us: all persons share the backlog, so it must be emptied.
_BURST, _PER_SECOND, _CREDITS = 256.0, 200.0, 4096  # connections of a person; persons whose credit is stored
_LOOKED_AT = 8  # connections checked for unread messages before one is evicted
_ROOT = 0
_HEARD = attrgetter("heard")


class Connection:
    """A requester's connection. Each request is answered on it, under the request's own seq and index."""

    def __init__(self, listener: Listener, connection: socket.socket) -> None:
        self._listener, self.socket = listener, connection
        self.pid, self.uid, _ = ucred.of_peer(connection)
        self.person = listener.people.of(self.uid)
        self._loop = listener.loop
        self.heard = listener.loop.now  # time of its last message or answer, in seconds of CLOCK_MONOTONIC
        self.pending = 0  # unanswered requests
        self._line: Line | None = None
        self.open = True

    @property
    def line(self) -> Line:
        """The peer and its ancestors, for self-deadlock detection. Read at the first request: the peer never
        changes."""
        if self._line is None:
            self._line = self._listener.people.line_of(self.pid)
        return self._line

    def on_readable(self) -> None:
        """Receives one message per turn of the loop, for fairness."""
        if self._listener.guarded and carries_rights(self.socket):
            self._listener.log("descriptors-refused", uid=self.uid, pid=self.pid)
            self.close()
            return
        try:
            data = receive(self.socket)
        except OSError:
            data = b""
        if data:
            self.heard = self._loop.now
            self._take(data)
        elif data is not None:
            self.close()

    def _take(self, data: bytes) -> None:
        try:
            envelope = take_request(data)
        except PeerError as error:
            self._refuse_malformed(data, error)
        else:
            self._listener.ask(self, envelope, Asked(self, envelope.seq, envelope.index))

    def _refuse_malformed(self, data: bytes, error: PeerError) -> None:
        try:
            seq, index = response_position(data)
        except PeerError:
            self.close()  # without seq and index it cannot be answered
            return
        self._listener.log("request-rejected", uid=self.uid, pid=self.pid, why=error)
        Asked(self, seq, index).settle(refusal("bad-request"))

    def answer(self, data: bytes) -> None:
        """Sends the answer to one request without blocking. A requester whose buffer is full loses its connection."""
        self.pending -= 1
        self.heard = self._loop.now
        if self._loop.pays(self.person):
            self._send(data)
        else:  # caused by a deadline or an end: the peer can make the send slow, so its person is charged
            self._loop.defer(self.person, partial(self._send, data))

    def _send(self, data: bytes) -> None:
        if not self.open:
            return
        try:
            self.socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            self.close()
        if self._listener.once:
            self.close()

    @property
    def unread(self) -> bool:
        """Whether unread data or the end of file is waiting."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Closes the connection. May be repeated."""
        if self.open:
            self.open = False
            self._listener.forget(self)
            self._listener.discard(self.socket, self.person)


class Asked:
    """The Origin of one request of a connection: sends the outcome to the requester."""

    __slots__ = ("_connection", "_index", "_seq", "wants_why")

    def __init__(self, connection: Connection, seq: int, index: int) -> None:
        self.wants_why = False
        self._connection, self._seq, self._index = connection, seq, index
        connection.pending += 1

    def settle(self, outcome: Answer | Refusal) -> None:
        """Sends the outcome. Called exactly once."""
        self._connection.answer(pack_response(self._seq, self._index, outcome))


class Listener(Source):
    """A listening socket at `path`. Subclasses implement `ask`. All methods run in the loop's thread."""

    mode = 0o600
    per_person, in_all = 64, 1024  # connections, root's not counted
    for_root = 1024
    once = False  # whether a connection is closed after its first answer
    limited = True  # whether new connections are rate-limited per person
    idle = 60.0  # seconds until a connection that is not busy ends

    def __init__(self, loop: Loop, router: Router, log: EventLog, people: People, path: Path) -> None:
        """OSError; UsageError if another broker listens at `path`."""
        super().__init__(loop, router, log)
        self.people, self._path = people, path
        self._listener = listen(path, self.mode)
        self._spare = _spare()
        self._held: dict[int, dict[int, dict[Connection, None]]] = {}  # by person and uid, in order of arrival
        self._counts: Counter[int] = Counter()  # by person
        self._count = 0  # of all persons but root
        self._idle_timer = loop.timer(self._end_idle)
        self._credits: dict[int, tuple[float, float]] = {}  # by person: connections it may make, at this time
        # Whether peers can send descriptors. Those of a socket with mode 0600 are trusted not to.
        self.guarded = self.mode != 0o600 and not takes_no_rights(self._listener)
        self._closer = Closer()
        loop.add(self._listener, self._on_connect, LISTENER)

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        """Handles a request. Must settle `origin`, or pass it to the router, which does."""
        raise NotImplementedError

    def make(self, accepted: socket.socket) -> Connection:
        """Returns the connection object for an accepted socket."""
        return Connection(self, accepted)

    def evictable(self, connection: Connection) -> bool:
        """Returns whether the connection may be ended to make room."""
        return True

    def admits(self, connection: Connection) -> bool:
        """Returns whether this peer may connect at all. The limits are checked elsewhere."""
        return True

    def busy(self, connection: Connection) -> bool:
        """Returns whether the connection is in use: it does not time out, and is evicted last."""
        return connection.pending > 0

    def owner(self, connection: Connection) -> int:
        """Returns the owner that the loop charges for the connection."""
        return connection.person

    # --- admission -----------------------------------------------------------------------------------------

    def _on_connect(self) -> None:
        now = self.loop.now
        self.people.look(now)
        end = time.monotonic() + _ACCEPTING
        for number in range(_ACCEPTS_PER_TURN):
            if number and time.monotonic() > end:
                return
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._free_descriptor():
                    continue
                self.log("connection-accept-failed", socket=self._path.name, why=error)
                self.loop.mute(self._listener, self.loop.now + _ACCEPT_PAUSE)
                return
            connection = self.make(accepted)
            if self._has_credit(connection.person, now) and self.admits(connection) and self._room_for(connection):
                accepted.setblocking(False)
                self._keep(connection)
                continue
            self.log("connection-refused", socket=self._path.name, uid=connection.uid, pid=connection.pid)
            self.discard(accepted, connection.person)

    def _has_credit(self, person: int, now: float) -> bool:
        """Applies the rate limit: returns whether the person may make a connection now."""
        if person == _ROOT or not self.limited:
            return True
        credit, since = self._credits.get(person, (_BURST, now))
        credit = min(_BURST, credit + (now - since) * _PER_SECOND)
        if len(self._credits) >= _CREDITS and person not in self._credits:
            self._credits = {
                one: had for one, had in self._credits.items() if had[0] + (now - had[1]) * _PER_SECOND < _BURST
            }
        self._credits[person] = max(0.0, credit - 1), now
        return credit >= 1

    def discard(self, connection: socket.socket, person: int) -> None:
        """Closes a connection; in another thread if it carries descriptors, whose closing may be slow."""
        if not self.guarded:
            connection.close()
        elif not discard(connection):
            self._closer.close(connection, person)

    def _keep(self, connection: Connection) -> None:
        self._held.setdefault(connection.person, {}).setdefault(connection.uid, {})[connection] = None
        self._counts[connection.person] += 1
        self._count += connection.person != _ROOT
        self._idle_timer.at(connection.heard + self.idle)
        self.loop.add(connection.socket, connection.on_readable, self.owner(connection))

    def _room_for(self, connection: Connection) -> bool:
        """Returns whether the connection is within the limits, after evicting another one if necessary."""
        person = connection.person
        mine = self._counts[person] + self._closer.stuck(person)
        if person == _ROOT:
            return mine < self.for_root
        if mine >= self.per_person:
            # epoll watches on a connection make its close slow: then refuse the new one, so that others do not wait.
            return not self.loop.charged(person) and self._evict(person, idle_only=True)
        if self._count < self.in_all:
            return True
        most = self._holds_most()
        return self._counts[most] > mine + 1 and self._evict(most)

    def _holds_most(self) -> int:
        """Returns the person, other than root, with most connections; root if there are none."""
        held = ((count, person) for person, count in self._counts.items() if person != _ROOT)
        return max(held, default=(0, _ROOT))[1]

    def _evict(self, person: int, idle_only: bool = False) -> bool:
        """Ends a connection of the person: the longest idle one of the uid that has most; a busy one only if none is
        idle. False if there is none to end."""
        victim = None
        if person != _ROOT:
            # Only one uid's connections are examined, because a flood evicts one for each new connection.
            for held in sorted(self._held.get(person, {}).values(), key=len, reverse=True):
                if victim := self._least_needed(held, idle_only):
                    break
        if victim is None:
            return False
        self.log("connection-evicted", socket=self._path.name, uid=victim.uid, pid=victim.pid)
        self.loop.measured(victim.person, victim.close)
        return True

    def _least_needed(self, held: Iterable[Connection], idle_only: bool) -> Connection | None:
        """Returns the longest idle connection without unread messages, otherwise the longest idle one, otherwise
        (unless `idle_only`) a busy one."""
        these = [one for one in held if self.evictable(one)]
        idle = sorted((one for one in these if not self.busy(one)), key=_HEARD)
        if not idle:
            return None if idle_only else min(these, key=_HEARD, default=None)
        return next((one for one in idle[:_LOOKED_AT] if not one.unread), idle[0])

    def _free_descriptor(self) -> bool:
        """Frees a descriptor by evicting a connection. If none can be evicted, refuses the new connection by means of
        the spare descriptor, so that the listener does not stay readable. Returns whether one was evicted."""
        if self._evict(self._holds_most()):
            return True
        if self._spare < 0:
            self._spare = _spare()
            return False
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = _spare()
        return False

    # --- time ----------------------------------------------------------------------------------------------

    def _end_idle(self, now: float) -> None:
        """Ends connections that were idle for `idle` seconds."""
        for connection in list(self._all()):
            if self.busy(connection) or connection.heard + self.idle > now:
                self._idle_timer.at(now + self.idle if self.busy(connection) else connection.heard + self.idle)
            elif connection.unread:
                self._idle_timer.at(now + self.idle)
            else:
                connection.close()

    def forget(self, connection: Connection) -> None:
        """Removes a connection from the loop and the counts. May be repeated."""
        self.loop.remove(connection.socket)
        person, uid = connection.person, connection.uid
        of_person = self._held.get(person, {})
        of_uid = of_person.get(uid, {})
        if connection not in of_uid:
            return
        del of_uid[connection]
        self._counts[person] -= 1
        self._count -= person != _ROOT
        if not of_uid:
            del of_person[uid]
        if not of_person:
            del self._held[person], self._counts[person]

    def _all(self) -> Iterator[Connection]:
        return (one for of_person in self._held.values() for of_uid in of_person.values() for one in of_uid)

    def close(self) -> None:
        """Closes all connections and the socket, and removes it from the file system."""
        for connection in list(self._all()):
            connection.close()
        self.loop.remove(self._listener)
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)
        unlink_quietly(self._path)


def _spare() -> int:
    """Opens a descriptor to be released when no other is free; -1 if there is none."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
