"""The broker's mind: who is asked, what is owed, when to give up. It knows no descriptor.

Every request that comes in is answered once: `ask` either settles it at once with a refusal or puts it into a
message context, and whoever takes it out of there settles it: an answer that fits, the deadline, the daemon's end,
or the broker's own.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from upcall.core.contexts import NO_LINE, Context, Contexts, Exhausted, Line, NoContext, Origin, Rejected
from upcall.core.errors import REASONS, PeerError
from upcall.core.latency import Latencies
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.registry import Association, Link, Registry
from upcall.core.service import Service
from upcall.wire.envelope import (
    NOTICE,
    QUIT,
    Envelope,
    pack_control,
    pack_request,
    refusal,
    response_position,
    take_response,
)

Log = Callable[..., None]
T = TypeVar("T")
# (uid, service, outcome, seconds, sequence number or 0): told of each request that is settled
Record = Callable[[int, str, str, float, int], None]
ROOT = 0
GONE = -1  # in the place of a uid: all whose own counters were given up
_COUNTED = 1024  # uids without a daemon whose own counters are kept


class Limits(NamedTuple):
    """How many daemons may be registered; root's is always admitted."""

    daemons: int = 2048  # of all uids
    daemons_per_person: int = 16  # of one person's uids


class _Parked(NamedTuple):
    """A request that waits for its daemon to be started."""

    service: str
    requester: Requester
    body: bytes
    origin: Origin
    deadline: float
    line: Line


class Router:
    """`services`: what may be asked. `log(event, **fields)` never blocks. Times are seconds, monotonic.

    `start(uid)` sets about starting a daemon and says whether that can be; see `given_up`. `machine`: the uid of the
    machine's daemon, which answers in root's place for services of the network, and for nothing else of root's.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        log: Log,
        start: Callable[[int], bool] = lambda _: False,
        machine: int = ROOT,
    ) -> None:
        self.services = services
        self.machine = machine
        self._start = start
        self._parked: dict[int, list[_Parked]] = {}
        self.registry = Registry()
        self.log = log
        # by uid: how often each service ended in "answered", or in which reason
        self.outcomes: dict[int, Counter[tuple[str, str]]] = {}
        self.latencies = {name: Latencies() for name in services}  # of what daemons were asked
        self.record: Record | None = None
        self.now = 0.0  # whoever runs the loop says each turn what the clock says; for what is told of requests only
        self.rejected: dict[int, Counter[str]] = {}  # by uid: replies that fitted no context, and on what
        self.limits = Limits()
        self.person_of: Callable[[int], int] = lambda uid: uid  # which uid counts for a uid
        self._contexts: dict[int, Contexts] = {}
        self._shares = {service.name: service.contexts for service in services.values()}
        self._wake = math.inf
        # A uid has a daemon, and has none any more: told to each of these, in this order.
        self.on_registered: list[Callable[[int], None]] = []
        self.on_gone: list[Callable[[int], None]] = []

    # --- requests ------------------------------------------------------------------------------------------

    def ask(
        self, uid: int, service: str, requester: Requester, body: bytes, origin: Origin, now: float,
        deadline: float = math.inf, line: Line = NO_LINE,
    ) -> None:  # fmt: skip
        """A request for the daemon of `uid`. Settled now or before the earlier of `deadline` and patience.

        `line`: who waits for it, as far as that is known: a daemon is never asked by itself or by its children."""
        rules = self.services[service]
        if uid == ROOT and rules.network:
            uid = self.machine
        association = self.registry.get(uid)
        deadline = min(deadline, now + rules.patience)
        if association is None or association.leaving:
            return self._without_daemon(uid, rules, _Parked(service, requester, body, origin, deadline, line), now)
        contexts = self._contexts[uid]
        try:
            if rules.reserve and len(self.registry) > 1 and contexts.left(service) <= rules.reserve:
                raise NoContext(service)
            context = contexts.acquire(service)
        except NoContext:
            return self._settle(uid, service, origin, refusal("no-context"))
        context.origin, context.body, context.requester = origin, body, requester
        context.since, context.line = now, line
        context.deadline = deadline
        self._wake = min(self._wake, context.deadline)
        self._send(association, contexts, context)
        return None

    def _without_daemon(self, uid: int, rules: Service, request: _Parked, now: float) -> None:
        """As the service's rules say: asked of the machine, parked until a daemon is there, or refused."""
        machines = uid == self.machine
        if rules.absent == "machine" and not machines:
            return self.ask(self.machine, *request[:4], now, request.deadline, request.line)
        # The machine's is a service of its own: what starts people's daemons would log somebody in.
        if rules.absent != "start" or (machines and uid != ROOT) or not self._start(uid):
            return self._settle(uid, rules.name, request.origin, refusal("no-daemon"))
        parked = self._parked.setdefault(uid, [])
        if sum(one.service == rules.name for one in parked) >= rules.contexts:
            return self._settle(uid, rules.name, request.origin, refusal("no-context"))
        parked.append(request)
        self._wake = min(self._wake, request.deadline)
        return None

    def given_up(self, uid: int, reason: str = "no-daemon") -> None:
        """No daemon of this uid could be started: what waits for it is refused."""
        for request in self._parked.pop(uid, ()):
            self._settle(uid, request.service, request.origin, refusal(reason))

    def _send(self, association: Association, contexts: Contexts, context: Context) -> None:
        """Hands a context to a daemon, or settles it if that cannot be."""
        if association.who in context.line:
            who = context.requester
            self.log("own-request", uid=association.uid, service=context.service, pid=who.pid, daemon=association.pid)
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("own-request"))
            return
        try:
            seq = contexts.send(context, association.pid)
        except Exhausted as error:
            self.log("exhausted", uid=association.uid, why=str(error))
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("no-context"))
            return
        envelope = Envelope(
            seq, context.index, context.service, context.requester, int(context.deadline * 1e9), context.body
        )
        try:
            taken = association.link.send(pack_request(envelope))
        except ConnectionError:
            self.gone(association)
            return
        if not taken:
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("daemon-full"))

    def answered(self, association: Association, data: bytes) -> bool:
        """What came in from a daemon as a RESPONSE. The envelope first: once it fits, an answer is owed.

        False if it fitted nothing.
        """
        contexts = self._contexts[association.uid]
        try:
            seq, index = response_position(data)
            context = contexts.match(index, seq, association.uid, association.pid)
        except (Rejected, PeerError) as error:
            on = error.on if isinstance(error, Rejected) else "length"
            self._counts(self.rejected, association.uid)[on] += 1
            association.rejected += 1
            self.log("reply-rejected", uid=association.uid, pid=association.pid, on=on)
            return False
        outcome = self._checked(association, context, data)
        self._finish(contexts, context, outcome)
        if isinstance(outcome, Answer):
            association.answered += 1
        else:
            association.refused += 1
        if association.leaving:
            self._let_go(association)
        return True

    def _checked(self, association: Association, context: Context, data: bytes) -> Answer | Refusal:
        try:
            outcome = take_response(data).outcome
            if isinstance(outcome, Answer):
                self.services[context.service].check(context.body, outcome.body)
            return outcome
        except PeerError as error:
            self.log("bad-answer", uid=association.uid, pid=association.pid, why=str(error))
            return refusal("bad-answer")

    def _finish(self, contexts: Contexts, context: Context, outcome: Answer | Refusal) -> None:
        """Settles a context that is done, and frees it."""
        service, origin, seq = context.service, context.origin, context.counter
        seconds = self.now - context.since
        contexts.free(context)
        self.latencies[service].add(seconds)
        if origin is not None:
            self._settle(contexts.uid, service, origin, outcome, seconds, seq)

    def _settle(
        self, uid: int, service: str, origin: Origin, outcome: Answer | Refusal, seconds: float = 0.0, seq: int = 0
    ) -> None:
        origin.settle(outcome)
        name = "answered"
        if isinstance(outcome, Refusal):
            name = outcome.reason if outcome.reason in REASONS else "other"
        (self.outcomes.get(uid) or self._counts(self.outcomes, uid))[service, name] += 1
        if self.record is not None:
            self.record(uid, service, name, seconds, seq)

    def _counts(self, counters: dict[int, Counter[T]], uid: int) -> Counter[T]:
        """The uid's own. When many are kept, those of uids without a daemon are added to those of GONE first."""
        counts = counters.get(uid)
        if counts is None:
            if len(counters) >= _COUNTED:
                gone = counters.setdefault(GONE, Counter())
                for one in [one for one in counters if one != GONE and self.registry.get(one) is None]:
                    gone.update(counters.pop(one))
            counts = counters[uid] = Counter()
        return counts

    def notice(self, uid: int, service: str, requester: Requester, body: bytes) -> str:
        """Tells the daemon of `uid` something that needs no answer. Returns "" if it was handed over, otherwise the
        reason: "no-daemon", or "daemon-full" if it takes no more now."""
        association = self.registry.get(uid)
        if association is None:
            return "no-daemon"
        if association.leaving:
            return "daemon-full"  # a newer one may be coming
        try:
            taken = association.link.send(pack_request(Envelope(0, 0, service, requester, 0, body), NOTICE))
        except ConnectionError:
            self.gone(association)
            return "no-daemon"
        return "" if taken else "daemon-full"

    # --- daemons -------------------------------------------------------------------------------------------

    def refuses(self, uid: int) -> str:
        """Why a daemon of this uid may not register now (one of REASONS); empty if it may.

        One that replaces the uid's daemon may: no more are registered then than before."""
        registry = self.registry
        if uid == ROOT or registry.get(uid) is not None:
            return ""
        person = self.person_of(uid)
        if len(registry) >= self.limits.daemons:
            return "too-many-daemons"
        return "too-many-daemons" if self.daemons_of(person) >= self.limits.daemons_per_person else ""

    def daemons_of(self, person: int) -> int:
        """How many daemons of a person's uids are registered."""
        return sum(1 for one in self.registry if one.uid != ROOT and self.person_of(one.uid) == person)

    def helo(self, uid: int, pid: int, portid: int, link: Link, now: float, began: int = 0) -> Association:
        """A daemon registers. An older one of the same uid is sent QUIT; what it held goes to the new one."""
        association = Association(uid, pid, portid, link, now, began)
        contexts = self._contexts.get(uid)
        if contexts is None:
            contexts = self._contexts[uid] = Contexts(uid, self._shares, secrets.randbits(32))
        old = self.registry.helo(association)
        if old is not None:
            self.log("replaced", uid=uid, pid=old.pid, by=pid)
            self._send_quit(old)
            old.link.close()
        for context in contexts.allocated:
            if self.registry.get(uid) is association:
                self._send(association, contexts, context)
        for service, requester, body, origin, deadline, line in self._parked.pop(uid, ()):
            self.ask(uid, service, requester, body, origin, now, deadline, line)
        if self.registry.get(uid) is association:  # otherwise it has gone while it was handed what was pending
            for tell in self.on_registered:
                tell(uid)
        return association

    def quit(self, association: Association) -> None:
        """A daemon wants to go: it is asked nothing more, and let go once it has answered what it holds."""
        association.leaving = True
        self._let_go(association)

    def _let_go(self, association: Association) -> None:
        if not self._contexts[association.uid].in_use:
            self._send_quit(association)
            self.gone(association)

    def _send_quit(self, association: Association) -> None:
        try:
            association.link.send(pack_control(QUIT))
        except ConnectionError:
            self.log("quit-unheard", uid=association.uid, pid=association.pid)

    def gone(self, association: Association) -> None:
        """A daemon is no more. What it held is refused now, not at the deadline."""
        if self.registry.remove(association):
            self.refuse_all(association.uid, "daemon-gone")
            del self._contexts[association.uid]
        association.link.close()
        if self.registry.get(association.uid) is None:
            for tell in self.on_gone:
                tell(association.uid)

    def refuse_all(self, uid: int, reason: str) -> None:
        """Refuses everything that the uid's daemon was asked."""
        contexts = self._contexts.get(uid)
        if contexts is None:
            return
        for context in contexts.allocated:
            contexts.withdraw(context)
            self._finish(contexts, context, refusal(reason))

    def close(self) -> None:
        """Refuses everything that is owed: the broker ends."""
        for uid in tuple(self._contexts):
            self.refuse_all(uid, "closing")
        for uid in tuple(self._parked):
            self.given_up(uid, "closing")

    # --- time ----------------------------------------------------------------------------------------------

    def next_wake(self) -> float:
        """When `expire` must be called at the latest; inf while nothing is owed."""
        return self._wake

    def expire(self, now: float) -> None:
        """Refuses what nobody answered in time."""
        if now < self._wake:
            return
        self._wake = math.inf
        for uid, contexts in tuple(self._contexts.items()):
            for context in contexts.expired(now):
                self.log("timed-out", uid=uid, index=context.index, service=context.service)
                self._finish(contexts, context, refusal("timed-out"))
            self._wake = min(self._wake, contexts.next_deadline() or math.inf)
            association = self.registry.get(uid)
            if association is not None and association.leaving:
                self._let_go(association)
        for uid in tuple(self._parked):
            self._expire_parked(uid, now)

    def _expire_parked(self, uid: int, now: float) -> None:
        late = [request for request in self._parked[uid] if request.deadline <= now]
        staying = self._parked[uid] = [request for request in self._parked[uid] if request.deadline > now]
        self._wake = min([self._wake, *(request.deadline for request in staying)])
        if not staying:
            del self._parked[uid]
        for request in late:
            self._settle(uid, request.service, request.origin, refusal("no-daemon"))

    # --- seeing --------------------------------------------------------------------------------------------

    def contexts_of(self, uid: int) -> Contexts | None:
        return self._contexts.get(uid)

    def status(self, now: float, uid: int | None = None) -> dict[str, object]:
        """What is going on, as plain data; of one uid, or of all."""
        daemons = []
        for association in self.registry:
            if uid is not None and association.uid != uid:
                continue
            contexts = self._contexts[association.uid]
            daemons.append(
                {
                    "uid": association.uid,
                    "pid": association.pid,
                    "portid": association.portid,
                    "age": round(now - association.since, 3),
                    "leaving": association.leaving,
                    "answered": association.answered,
                    "refused": association.refused,
                    "rejected": association.rejected,
                    "contexts": {"size": len(contexts), "in_use": contexts.in_use, "most": contexts.most},
                    "pending": [
                        {
                            "index": context.index,
                            "seq": context.counter,
                            "service": context.service,
                            "age": round(now - context.since, 3),
                        }
                        for context in contexts.allocated
                    ],
                }
            )
        outcomes: dict[str, dict[str, int]] = {}
        rejected: Counter[str] = Counter()
        for one in self.outcomes.keys() | self.rejected.keys() if uid is None else [uid]:
            for (service, outcome), count in self.outcomes.get(one, Counter()).items():
                counts = outcomes.setdefault(service, {})
                counts[outcome] = counts.get(outcome, 0) + count
            rejected += self.rejected.get(one, Counter())
        found: dict[str, object] = {"daemons": daemons, "outcomes": outcomes, "rejected": dict(rejected)}
        if uid is None:
            found["latencies"] = {name: one.status() for name, one in self.latencies.items() if one.count}
        return found
