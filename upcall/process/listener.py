"""A listening socket of the broker and its connections: each asks, and is answered on the same connection.

Admission: connections are limited per person (the owner of a range of subordinate uids, upcall/process/people.py) and
in all. At a limit, a newcomer takes the place of the longest idle connection of the person who holds most. Root's
connections have room of their own and are never evicted. Idle connections end after `idle` seconds.
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
# A new connection costs up to 0.2 ms, so each person has a rate limit. What is beyond it is closed as soon as it is
# accepted, which costs 15 us: the backlog is shared by all, and has to be emptied for the others.
_BURST, _PER_SECOND, _CREDITS = 256.0, 200.0, 4096  # connections of a person; persons whose credit is kept
_LOOKED_AT = 8  # connections whose queue is looked into before one is evicted
_ROOT = 0
_HEARD = attrgetter("heard")


class Connection:
    """One who asks. What it sends is answered on the same connection, by its own seq and index."""

    def __init__(self, listener: Listener, connection: socket.socket) -> None:
        self._listener, self.socket = listener, connection
        self.pid, self.uid, _ = ucred.of_peer(connection)
        self.person = listener.people.of(self.uid)
        self._loop = listener.loop
        self.heard = listener.loop.now  # when it last sent something, or was last answered
        self.pending = 0  # requests that are not answered yet
        self._line: Line | None = None
        self.open = True

    @property
    def line(self) -> Line:
        """From whom the other side descends: as it was at the first request, for a peer never changes."""
        if self._line is None:
            self._line = self._listener.people.line_of(self.pid)
        return self._line

    def on_readable(self) -> None:
        """One message per turn, as with daemons."""
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
            seq, index = response_position(data)
        except PeerError:
            self.close()  # there is nothing to answer to
            return
        origin = Asked(self, seq, index)
        try:
            envelope = take_request(data)
        except PeerError as error:
            self._listener.log("request-rejected", uid=self.uid, pid=self.pid, why=error)
            origin.settle(refusal("bad-request"))
            return
        self._listener.ask(self, envelope, origin)

    def answer(self, data: bytes) -> None:
        """To one request. Who does not read loses the connection: nobody waits for it."""
        self.pending -= 1
        self.heard = self._loop.now
        if self._loop.pays(self.person):
            self._send(data)
        else:  # a deadline, or an end: the peer can make our send slow, and pays for it itself
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
        """Whether it has sent something that was not read yet, or has ended."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        if self.open:
            self.open = False
            self._listener.forget(self)
            self._listener.discard(self.socket, self.person)


class Asked:
    """One request of a connection: takes the outcome and sends it."""

    __slots__ = ("_connection", "_index", "_seq")

    def __init__(self, connection: Connection, seq: int, index: int) -> None:
        self._connection, self._seq, self._index = connection, seq, index
        connection.pending += 1

    def settle(self, outcome: Answer | Refusal) -> None:
        self._connection.answer(pack_response(self._seq, self._index, outcome))


class Listener(Source):
    """The socket at `path`. What is asked there is the affair of those who inherit this."""

    mode = 0o600
    per_person, in_all = 64, 1024  # connections; root's are not among them
    for_root = 1024
    once = False  # each connection asks one thing, and is closed with the answer
    limited = True  # new connections, by person
    idle = 60.0  # seconds until a connection that is not busy ends

    def __init__(self, loop: Loop, router: Router, log: EventLog, people: People, path: Path) -> None:
        """UsageError if a broker listens there already."""
        super().__init__(loop, router, log)
        self.people, self._path = people, path
        self._listener = listen(path, self.mode)
        self._spare = _spare()
        self._held: dict[int, dict[int, dict[Connection, None]]] = {}  # by person and uid, in order of arrival
        self._counts: Counter[int] = Counter()  # by person
        self._count = 0  # of all persons but root
        self._idle_timer = loop.timer(self._end_idle)
        self._credits: dict[int, tuple[float, float]] = {}  # by person: how many it may make, and when that was so
        # Whether descriptors can be sent to us; root's own socket is reached by root alone.
        self.guarded = self.mode != 0o600 and not takes_no_rights(self._listener)
        self._closer = Closer()
        loop.add(self._listener, self._on_connect, LISTENER)

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        """Sees to it that the origin is settled."""
        raise NotImplementedError

    def make(self, accepted: socket.socket) -> Connection:
        """What is known of a peer that has connected."""
        return Connection(self, accepted)

    def evictable(self, connection: Connection) -> bool:
        """Whether it may be ended to make room, if need be."""
        return True

    def admits(self, connection: Connection) -> bool:
        """Who may be connected at all; how many may be is seen to elsewhere."""
        return True

    def busy(self, connection: Connection) -> bool:
        """Whether the connection does not count as idle now, and is evicted last."""
        return connection.pending > 0

    def owner(self, connection: Connection) -> int:
        """On whose account the connection is served."""
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
        """Whether the person may make a connection now."""
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
        """Closes a connection; in another thread if what its peer has sent could make that slow."""
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
        """Whether it can stay, once another one was evicted for it if need be."""
        person = connection.person
        mine = self._counts[person] + self._closer.stuck(person)
        if person == _ROOT:
            return mine < self.for_root
        if mine >= self.per_person:
            # Watches on their ends make our closes slow: then its newcomers are refused, and nobody waits.
            return not self.loop.charged(person) and self._evict(person, idle_only=True)
        if self._count < self.in_all:
            return True
        most = self._holds_most()
        return self._counts[most] > mine + 1 and self._evict(most)

    def _holds_most(self) -> int:
        """The person but root with most connections; root if nobody has any."""
        held = ((count, person) for person, count in self._counts.items() if person != _ROOT)
        return max(held, default=(0, _ROOT))[1]

    def _evict(self, person: int, idle_only: bool = False) -> bool:
        """Ends a connection of the person: of the uid that holds most of them, the longest idle one; of those that
        are busy only if none is idle. False if there is none to end."""
        victim = None
        if person != _ROOT:
            # Only one uid's connections are looked at closely: a flood of newcomers evicts with each of them.
            for held in sorted(self._held.get(person, {}).values(), key=len, reverse=True):
                if victim := self._least_needed(held, idle_only):
                    break
        if victim is None:
            return False
        self.log("connection-evicted", socket=self._path.name, uid=victim.uid, pid=victim.pid)
        self.loop.measured(victim.person, victim.close)
        return True

    def _least_needed(self, held: Iterable[Connection], idle_only: bool) -> Connection | None:
        """The longest idle one without unread messages, or the longest idle one, or (not `idle_only`) a busy one."""
        these = [one for one in held if self.evictable(one)]
        idle = sorted((one for one in these if not self.busy(one)), key=_HEARD)
        if not idle:
            return None if idle_only else min(these, key=_HEARD, default=None)
        return next((one for one in idle[:_LOOKED_AT] if not one.unread), idle[0])

    def _free_descriptor(self) -> bool:
        """No descriptor is free: evicts a connection, or refuses the newcomer by means of the spare descriptor, so
        that the listener does not stay readable for ever. False if there was none."""
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
        """Ends connections that were idle for too long."""
        for connection in list(self._all()):
            if self.busy(connection) or connection.heard + self.idle > now:
                self._idle_timer.at(now + self.idle if self.busy(connection) else connection.heard + self.idle)
            elif connection.unread:
                self._idle_timer.at(now + self.idle)
            else:
                connection.close()

    def forget(self, connection: Connection) -> None:
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
        for connection in list(self._all()):
            connection.close()
        self.loop.remove(self._listener)
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)
        unlink_quietly(self._path)


def _spare() -> int:
    """A descriptor that is given up when none is free; -1 if there is none."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
