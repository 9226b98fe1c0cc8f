"""Accepts requests from forwarders, which the kernel starts for request_key(2), and passes them to the router.

The forwarder must run as root, but is not trusted otherwise: its description of the key is compared with the kernel's,
and then checked by upcall/protocols/request_key/origin_check.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from upcall.core.errors import PeerError, Refused
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.router import Router
from upcall.process.listener import Asked, Connection, Listener
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.people import People
from upcall.protocols.request_key import origin_check as gate
from upcall.protocols.request_key.key_type import Wanted
from upcall.protocols.request_key.messages import SERVICE, Ask, Described, Upcall, pack_ask, take_upcall
from upcall.wire.envelope import Envelope, refusal

_WAY_BACK = 0.25  # seconds before the forwarder's deadline, reserved for instantiating the key


class Waiting(Protocol):
    """The requesting process, pinned: upcall.protocols.request_key.origin.Process."""

    who: gate.Who

    @property
    def lives(self) -> bool: ...
    def close(self) -> None: ...


class Kernel(Protocol):
    """Queries about keys and processes: upcall.protocols.request_key.origin. Tests pass another implementation."""

    def key(self, serial: int, /) -> Described:
        """Returns the description of a key. OSError, PeerError."""
        ...

    def Process(self, pid: int, /) -> Waiting:
        """Pins the process of a thread. ProcessLookupError."""
        ...

    def started_at(self, pid: int, /) -> int:
        """Returns a process's start time, in clock ticks since boot. ProcessLookupError."""
        ...

    def asked_by(self, authorisation: int, /) -> int:
        """Returns the pid of the process that waits for the key; 0 if the kernel does not report it."""
        ...


class _Key:
    """The origin of a request for one key: passes the outcome to the forwarder that instantiates it."""

    wants_why = False

    def __init__(self, forwarders: Forwarders, key: int, uid: int, process: Waiting | None, asked: Asked) -> None:
        self._forwarders, self._key, self._uid = forwarders, key, uid
        self._process, self._asked = process, asked

    def settle(self, outcome: Answer | Refusal) -> None:
        if isinstance(outcome, Answer) and self._process is not None and not self._process.lives:
            outcome = refusal("requester-gone")
        self._asked.settle(outcome)
        if self._process is not None:
            self._process.close()
        self._forwarders.done(self._key, outcome, self._uid)


class Forwarders(Listener):
    """Listens for forwarders on a socket that only root can connect to."""

    name = "request_key"
    per_person = in_all = for_root = 512
    limited = False  # no rate limit: only root can connect
    once = True

    def __init__(
        self, loop: Loop, router: Router, log: EventLog, people: People, path: Path, kernel: Kernel,
        owners: Mapping[str, int], me: int,
    ) -> None:  # fmt: skip
        """`owners`: type -> uid whose daemon answers, for types whose descriptions name none. `me`: the only uid that
        forwarders may have. `path`: of the socket. Must be constructed and used in the loop's thread."""
        self._kernel, self.owners, self._me = kernel, owners, me
        self._pending: set[int] = set()
        self.counts: Counter[str] = Counter()
        super().__init__(loop, router, log, people, path)

    def follow(self, owners: Mapping[str, int]) -> None:
        self.owners = owners

    def status(self, uid: int | None) -> dict[str, object]:
        return {} if uid is not None else {"request_key": dict(self.counts)}

    def admits(self, connection: Connection) -> bool:
        return connection.uid == self._me and super().admits(connection)

    def owner(self, connection: Connection) -> int:
        return URGENT  # forwarders act for the kernel and bypass fair queueing

    def ask(self, connection: Connection, envelope: Envelope, origin: Asked) -> None:
        upcall = None
        try:
            upcall = take_upcall(envelope.body)
            if envelope.service != SERVICE:
                raise Refused("no-service", why=f"service {envelope.service!r}")
            self._ask(connection, envelope, upcall, origin)
        except (Refused, PeerError) as error:
            self._deny(upcall, error, origin)

    def _ask(self, connection: Connection, envelope: Envelope, upcall: Upcall, origin: Asked) -> None:
        """Checks an upcall and asks the daemon. Refused or PeerError if a check fails."""
        if upcall.key in self._pending:
            raise Refused("duplicate", why="it is being answered already")
        try:
            key, authorisation = self._kernel.key(upcall.key), self._kernel.key(upcall.authorisation)
        except OSError as error:
            raise Refused("forged", why=f"the kernel does not show it: {error.strerror}") from error
        described = b"%b;%d;%d;%08x;%b" % (key.type.encode(), *key[1:])
        if described != upcall.described:
            raise Refused("forged", why="the kernel describes it otherwise")
        gate.check_key(upcall, key, authorisation)
        want = gate.wanted(key)
        uid = self.owners.get(key.type, want.uid)
        service = self.router.services[key.type]
        body = pack_ask(Ask(key.description, upcall.callout))
        service.check_request(body)
        process = self._process(want, connection)
        if process is not None:
            requester = Requester(process.who.uid, process.who.pid)
        else:
            requester = Requester(0, self._kernel.asked_by(upcall.authorisation))
        self._pending.add(upcall.key)
        deadline = envelope.deadline_ns / 1e9 - _WAY_BACK if envelope.deadline_ns else math.inf
        answer_to = _Key(self, upcall.key, uid, process, origin)
        line = self.people.line_of(requester.pid)
        self.router.ask(uid, service.name, requester, body, answer_to, self.loop.now, deadline, line)

    def _process(self, want: Wanted, connection: Connection) -> Waiting | None:
        """Pins and checks the requesting process. None if the description names none. Refused if a check fails. The
        caller must close it."""
        if want.pid is None:
            return None
        try:
            since = self._kernel.started_at(connection.pid)
            process = self._kernel.Process(want.pid)
        except ProcessLookupError as error:
            raise Refused("requester-gone", why=str(error)) from error
        try:
            gate.check_requester(want, process.who, since)
        except BaseException:
            process.close()
            raise
        return process

    def _deny(self, upcall: Upcall | None, error: Refused | PeerError, origin: Asked) -> None:
        denied = refusal(error.reason, error.errno) if isinstance(error, Refused) else refusal("bad-request")
        origin.settle(denied)
        self.counts[denied.reason] += 1
        told = upcall.described.decode("ascii", "backslashreplace")[:256] if upcall is not None else ""
        why = error.why if isinstance(error, Refused) else str(error)
        self.log("upcall-denied", reason=denied.reason, why=why, key=upcall and upcall.key, described=told)

    def done(self, key: int, outcome: Answer | Refusal, uid: int) -> None:
        """Counts and logs the outcome for a key that passed the checks."""
        self._pending.discard(key)
        if isinstance(outcome, Refusal):
            self.counts[outcome.reason] += 1
            self.log("upcall-refused", reason=outcome.reason, uid=uid, key=key)
        else:
            self.counts["answered"] += 1
