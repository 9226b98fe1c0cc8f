"""Models the broker's core as a state machine, with simulated links, origins and time. Invariants after each step:

    each request is settled exactly once, by its deadline, and only by its uid's daemon (or the machine's, if the
    service allows it); never with an answer that a check refused, and never by a message that does not match;
    index and sequence number are not reused while they are pending; after `close` nothing is pending.

Driven by bytes (fuzz.targets.router) and by hypothesis (tests/test_fuzz_router.py). Uses only the core's public
interface.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from fuzz.target import holds, same
from upcall.core.errors import PeerError
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.registry import Association
from upcall.core.router import Router
from upcall.core.service import Service
from upcall.wire.envelope import (
    NOTICE,
    QUIT,
    REQUEST,
    Envelope,
    pack_response,
    refusal,
    take_message,
    take_request,
)

UIDS: Final = (1000, 1001, 0)
MACHINE: Final = 0
REQUESTS: Final = 64  # limit for one run: each step checks all of them


def check(asked: bytes, answer: bytes) -> None:
    if answer != b"re: " + asked:
        raise PeerError("answer", "is wrong")


SERVICES: Final = {
    service.name: service
    for service in (
        Service("refused", 2.5, 2, 0, check, len, local=True),
        Service("reserved", 10.0, 4, 1, check, len, local=True),
        Service("started", 5.0, 2, 0, check, len, local=True, absent="start"),
        Service("machine", 5.0, 2, 0, check, len, local=True, absent="machine"),
    )
}
NAMES: Final = tuple(SERVICES)


def _why(uid: int) -> str:
    return f"said by the daemon of {uid}"


class Sent(NamedTuple):
    """A request as it was sent to a daemon."""

    link: Link
    envelope: Envelope


class Link:
    """A simulated link to one daemon. `state`: "well", "full" or "dead"."""

    def __init__(self, world: World, uid: int, pid: int, state: str) -> None:
        self._world, self.uid, self.pid, self.state = world, uid, pid, state
        self.association: Association | None = None
        self.open = True

    def send(self, data: bytes, /) -> bool:
        holds(self.open, "sent to a link that is closed")
        if self.state == "dead":
            raise ConnectionRefusedError
        if self.state == "full":
            return False
        kind = take_message(data).type
        if kind == REQUEST:
            self._world.was_sent(Sent(self, take_request(data)))
        elif kind == NOTICE:
            same(take_request(data).body, b"for %d" % self.uid)
        else:
            same(kind, QUIT)
        return True

    def close(self) -> None:
        self.open = False


class Request:
    """A simulated origin of a request, with its state. Every other one wants to know why it is refused."""

    def __init__(self, world: World, number: int, uid: int, service: Service, deadline: float) -> None:
        self._world, self.number, self.uid, self.service, self.deadline = world, number, uid, service, deadline
        self.wants_why = number % 2 == 1
        self.outcome: Answer | Refusal | None = None
        self.pending: Sent | None = None  # the last message that carried it to a daemon

    @property
    def body(self) -> bytes:
        return b"%d" % self.number

    @property
    def answerers(self) -> set[int]:
        return {self.uid, MACHINE} if self.service.absent == "machine" else {self.uid}

    def settle(self, outcome: Answer | Refusal, /) -> None:
        holds(self.outcome is None, f"request {self.number} is settled twice")
        self.outcome, self.pending = outcome, None
        self._world.settled.append(self)
        if isinstance(outcome, Answer):
            same(outcome.body, b"re: " + self.body)
        elif outcome.why:
            holds(self.wants_why, "an origin that does not want it gets a why")
            same(outcome.why, _why(self.uid))


class World:
    """One broker with its daemons, requests and clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.can_start = True
        self.broker = Router(SERVICES, lambda event, **fields: None, lambda uid: self.can_start, random_u32=lambda: 0)
        self.requests: list[Request] = []
        self.links: list[Link] = []
        self.sent: list[Sent] = []
        self.settled: list[Request] = []  # within one step
        self.answering: Link | None = None
        self._pid = 1

    # --- what the core does ----------------------------------------------------------------------------------

    def was_sent(self, sent: Sent) -> None:
        request = self.requests[int(sent.envelope.body)]
        holds(request.outcome is None, "a request is sent after it was settled")
        holds(sent.link.uid in request.answerers, "a request is sent to another uid's daemon")
        same(sent.envelope.service, request.service.name)
        for other in self._pending():
            if other is not request and other.pending is not None and other.pending.link.uid == sent.link.uid:
                holds(other.pending.envelope.index != sent.envelope.index, "an index is used while it is pending")
                holds(other.pending.envelope.seq != sent.envelope.seq, "a sequence is used while it is pending")
        if request.pending is not None:
            holds(request.pending.envelope.seq != sent.envelope.seq, "a successor is sent the old sequence")
        request.pending = sent
        self.sent.append(sent)

    def _pending(self) -> Iterator[Request]:
        return (request for request in self.requests if request.outcome is None)

    # --- steps -----------------------------------------------------------------------------------------------

    def helo(self, uid: int, state: str = "well", same_process: bool = False) -> None:
        """Registers a daemon; also a second one of a uid, and a second time from the same process."""
        self._pid += not same_process
        link = Link(self, uid, self._pid, state)
        self.links.append(link)
        link.association = self.broker.helo(uid, self._pid, self._pid, link, self.now)
        self.look()

    def ask(self, uid: int, name: str, patience: float = math.inf) -> None:
        if len(self.requests) >= REQUESTS:
            return
        service = SERVICES[name]
        deadline = self.now + min(patience, service.patience)
        request = Request(self, len(self.requests), uid, service, deadline)
        self.requests.append(request)
        who = Requester(uid, 99)
        self.broker.ask(uid, name, who, request.body, request, self.now, self.now + patience)
        self.look()

    def notice(self, uid: int) -> None:
        self.broker.notice(uid, "refused", Requester(uid, 99), b"for %d" % uid)
        self.look()

    def answer(self, sent: Sent, link: Link, how: str, cut: int = 0) -> None:
        """Sends an answer from any present daemon to any request that was ever sent to a daemon."""
        if not link.open or link.association is None:
            return
        envelope = sent.envelope
        seq, index = envelope.seq, envelope.index
        outcome: Answer | Refusal = Answer(b"re: " + envelope.body)
        if how == "wrong":
            outcome = Answer(b"nonsense")
        elif how == "refusal":
            outcome = refusal("locked", why=_why(link.uid))
        elif how == "sequence":
            seq = (seq + 1 + cut) % (1 << 32)
        elif how == "index":
            index = cut % 24
        message = pack_response(seq, index, outcome)
        if how == "cut":
            message = message[: cut % (len(message) + 1)]
        wanted = self._fitting(message, link)
        before, self.settled = self.settled, []
        taken = self.broker.answered(link.association, message)
        same([request.number for request in self.settled], [request.number for request in wanted])
        same(taken, bool(wanted))
        if wanted and how in ("right", "index", "sequence"):
            good = outcome == Answer(b"re: " + wanted[0].body)
            same(wanted[0].outcome, outcome if good else refusal("bad-answer"))
        self.settled = before
        self.look()

    def _fitting(self, message: bytes, link: Link) -> list[Request]:
        """Returns the requests that a message may settle: at most the one that was sent on this link with these
        numbers."""
        if len(message) < 24:
            return []
        seq, index = int.from_bytes(message[8:12], sys.byteorder), int.from_bytes(message[16:20], sys.byteorder)
        return [
            request
            for request in self._pending()
            if request.pending is not None
            and request.pending.link is link
            and (request.pending.envelope.seq, request.pending.envelope.index) == (seq, index)
        ]

    def quit(self, link: Link) -> None:
        if link.open and link.association is not None:
            self.broker.quit(link.association)
            self.look()

    def gone(self, link: Link) -> None:
        """Ends a daemon's connection, also one that has ended before."""
        if link.association is not None:
            link.state = "dead"
            self.broker.gone(link.association)
            self.look()

    def give_up(self, uid: int) -> None:
        self.broker.given_up(uid)
        self.look()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.broker.expire(self.now)
        for request in self._pending():
            holds(request.deadline > self.now, f"request {request.number} is past its deadline")
        self.look()

    def look(self) -> None:
        """Checks the invariants between steps."""
        waiting = list(self._pending())
        for request in waiting:
            holds(self.broker.next_wake() <= request.deadline, "the broker would sleep through a deadline")
        for uid in UIDS:
            contexts = self.broker.contexts_of(uid)
            held = [one for one in waiting if one.pending is not None and one.pending.link.uid == uid]
            same(contexts.in_use if contexts is not None else 0, len(held))
        for link in self.links:
            there = link.association is None or self.broker.registry.get(link.uid) is link.association
            holds(there or not link.open, "a link is open that nobody is behind")

    def close(self) -> None:
        self.broker.close()
        for request in self.requests:
            holds(request.outcome is not None, f"request {request.number} is lost")
        for uid in UIDS:
            contexts = self.broker.contexts_of(uid)
            same(contexts.in_use if contexts is not None else 0, 0)


HOWS: Final = ("right", "right", "wrong", "refusal", "sequence", "index", "cut", "right")
STATES: Final = ("well", "well", "well", "full", "dead")
WAITS: Final = (0.0, 0.4, 2.5, 11.0)
PATIENCES: Final = (math.inf, 0.5, 3.0, 0.0)


def play(data: bytes, world: Callable[[], World] = World) -> None:
    """Runs steps of four bytes each: action, uid, object, variant."""
    played = world()
    for at in range(0, len(data) - 3, 4):
        _step(played, *data[at : at + 4])
    played.close()


def _step(world: World, what: int, who: int, which: int, how: int) -> None:
    uid = UIDS[who % len(UIDS)]
    link = world.links[-1 - who % len(world.links)] if world.links else None
    kind = what % 16
    if kind < 4:
        world.ask(uid, NAMES[which % len(NAMES)], PATIENCES[how % len(PATIENCES)])
    elif kind < 6 or link is None:
        world.helo(uid, STATES[which % len(STATES)], how % 4 == 3)
    elif kind < 11 and world.sent:
        sent = world.sent[-1 - which % len(world.sent)]
        # mostly from the daemon it was sent to
        world.answer(sent, sent.link if who % 4 else link, HOWS[how % len(HOWS)], how // len(HOWS) + what // 16)
    elif kind == 11:
        world.quit(link)
    elif kind == 12:
        world.gone(link)
    elif kind == 13:
        world.wait(WAITS[how % len(WAITS)])
    elif kind == 14 and link.state != "dead":
        link.state = STATES[which % len(STATES)]
    elif how % 3 == 0:
        world.give_up(uid)
    elif how % 3 == 1:
        world.can_start = not world.can_start
    else:
        world.notice(uid)
