"""Routes requests to daemons, matches replies, enforces deadlines. No I/O.

Every request is settled exactly once: `ask` either refuses it at once or puts it into a message context. It is settled
when it is taken out: by a matching reply, its deadline, the daemon's end, or the broker's end.
"""

from __future__ import annotations

import math
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
    REQUEST,
    pack_control,
    pack_request_of,
    refusal,
    response_head,
    response_position,
    take_outcome,
)

Log = Callable[..., None]
T = TypeVar("T")
# (uid, service, outcome, seconds, sequence number or 0): called for each request that is settled
Record = Callable[[int, str, str, float, int], None]
ROOT = 0
GONE = -1  # stands for all uids whose counters were merged, see Router._counts
_COUNTED = 1024  # uids with counters of their own; above this, those of uids without a daemon are merged


class Limits(NamedTuple):
    """The limits of registered daemons. Root's daemon is always admitted."""

    daemons: int = 2048  # of all uids
    daemons_per_person: int = 16  # of one person's uids


class _Parked(NamedTuple):
    """A request that waits until its daemon has started."""

    service: str
    requester: Requester
    body: bytes
    origin: Origin
    deadline: float
    line: Line


class Router:
    """Routes requests to the daemon of their uid and settles each exactly once.

    Not thread-safe: every method runs in the thread of the loop, and none blocks. All times are seconds of
    CLOCK_MONOTONIC (time.monotonic). The caller calls `expire` at `next_wake` at the latest.

    `services`: by name. `log(event, **fields)` must not block. `start(uid)` begins to start a daemon and returns
    whether one is on its way; `given_up` must be called if none comes. `machine`: the uid of the machine's daemon,
    which is asked instead of root's for services with `network`. `random_u32`: where a daemon's sequence numbers
    begin; unpredictable, so that no reply to an earlier broker matches.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        log: Log,
        start: Callable[[int], bool] = lambda _: False,
        machine: int = ROOT,
        *,
        random_u32: Callable[[], int],
    ) -> None:
        self.services = services
        self.machine = machine
        self._start, self._random_u32 = start, random_u32
        self._parked: dict[int, list[_Parked]] = {}
        self.registry = Registry()
        self.log = log
        # by uid: how often each (service, outcome) occurred; outcome: "answered" or the reason of a refusal
        self.outcomes: dict[int, Counter[tuple[str, str]]] = {}
        self.latencies = {name: Latencies() for name in services}  # of what daemons were asked
        self.record: Record | None = None
        self.now = 0.0  # set by the loop in each turn; used to measure latencies only
        self.rejected: dict[int, Counter[str]] = {}  # by uid: replies that matched no context, by the failed check
        self.limits = Limits()
        self.person_of: Callable[[int], int] = lambda uid: uid  # which person's limits apply to a uid
        self._contexts: dict[int, Contexts] = {}
        self._shares = {service.name: service.contexts for service in services.values()}
        self._wake = math.inf
        # Called with a uid when it has a daemon, and when it has none any more; in this order.
        self.on_registered: list[Callable[[int], None]] = []
        self.on_gone: list[Callable[[int], None]] = []

    # --- requests ------------------------------------------------------------------------------------------

    def ask(
        self, uid: int, service: str, requester: Requester, body: bytes, origin: Origin, now: float,
        deadline: float = math.inf, line: Line = NO_LINE,
    ) -> None:  # fmt: skip
        """Sends a request to the daemon of `uid`; settles `origin` exactly once, possibly before this returns.

        `service`: a key of `services`, otherwise KeyError. `body`: its request, already checked by the caller with
        `check_request`; at most wire.envelope.MAX_BODY bytes, otherwise PeerError. `requester`: passed to the daemon.
        `now`: CLOCK_MONOTONIC in seconds. The request is settled by the earlier of `deadline` and `now` + the
        service's patience, provided that `expire` is called in time.

        The outcome is an Answer that has passed the service's check, or a Refusal: "no-daemon", "no-context",
        "daemon-full", "daemon-gone", "timed-out", "bad-answer", "own-request", "closing", or the daemon's reason.

        `line`: the requesting process and its ancestors, as far as known, for self-deadlock detection: a daemon that
        is among them is not asked ("own-request").
        """
        rules = self.services[service]
        if uid == ROOT and rules.network:
            uid = self.machine
        association = self.registry.get(uid)
        latest = now + rules.patience
        if deadline > latest:
            deadline = latest
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
        if deadline < self._wake:
            self._wake = deadline
        self._send(association, contexts, context)
        return None

    def _without_daemon(self, uid: int, rules: Service, request: _Parked, now: float) -> None:
        """Asks the machine's daemon, parks the request until a daemon has started, or refuses: see Service.absent."""
        machines = uid == self.machine
        if rules.absent == "machine" and not machines:
            return self.ask(self.machine, *request[:4], now, request.deadline, request.line)
        # The machine's daemon is a system service. The start command would open a login session for its uid.
        if rules.absent != "start" or (machines and uid != ROOT) or not self._start(uid):
            return self._settle(uid, rules.name, request.origin, refusal("no-daemon"))
        parked = self._parked.setdefault(uid, [])
        if sum(one.service == rules.name for one in parked) >= rules.contexts:
            return self._settle(uid, rules.name, request.origin, refusal("no-context"))
        parked.append(request)
        self._wake = min(self._wake, request.deadline)
        return None

    def given_up(self, uid: int, reason: str = "no-daemon") -> None:
        """Refuses the requests that wait for a daemon of this uid to start. Called when none could be started."""
        for request in self._parked.pop(uid, ()):
            self._settle(uid, request.service, request.origin, refusal(reason))

    def _send(self, association: Association, contexts: Contexts, context: Context) -> None:
        """Sends a context to a daemon; settles it with a refusal if it would deadlock or cannot be sent."""
        if context.line and association.who in context.line:
            who = context.requester
            self.log(
                "deadlock-refused", uid=association.uid, service=context.service, pid=who.pid, daemon=association.pid
            )
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("own-request"))
            return
        try:
            seq = contexts.send(context, association.pid)
        except Exhausted as error:
            self.log("sequence-exhausted", uid=association.uid, why=str(error))
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("no-context"))
            return
        data = pack_request_of(
            REQUEST, seq, context.index, context.service, context.requester, int(context.deadline * 1e9),
            context.body, _may_know_why(association, context),
        )  # fmt: skip
        try:
            taken = association.link.send(data)
        except ConnectionError:
            self.gone(association)
            return
        if not taken:
            contexts.withdraw(context)
            self._finish(contexts, context, refusal("daemon-full"))

    def answered(self, association: Association, data: bytes) -> bool:
        """Matches a RESPONSE from a daemon to its context, checks it, and settles the request.

        `data`: the whole message, from a sender whose credentials are those of `association`. The envelope is matched
        first: from then on the request is settled, with "bad-answer" if the rest is malformed. False if no context
        matched.
        """
        contexts = self._contexts[association.uid]
        head = response_head(data)
        try:
            seq, index = (head[3], head[5]) if head else response_position(data)
            context = contexts.match(index, seq, association.uid, association.pid)
        except (Rejected, PeerError) as error:
            on = error.on if isinstance(error, Rejected) else "length"
            self._counts(self.rejected, association.uid)[on] += 1
            association.rejected += 1
            self.log("reply-rejected", uid=association.uid, pid=association.pid, on=on)
            return False
        outcome = self._checked(association, context, data, head)
        self._finish(contexts, context, outcome)
        if isinstance(outcome, Answer):
            association.answered += 1
        else:
            association.refused += 1
        if association.leaving:
            self._let_go(association)
        return True

    def _checked(
        self, association: Association, context: Context, data: bytes, head: tuple[int, ...]
    ) -> Answer | Refusal:
        """Returns the outcome of a matched reply: the daemon's, or "bad-answer" if it is malformed or fails the
        check."""
        try:
            outcome = take_outcome(head, data)
            if isinstance(outcome, Answer):
                self.services[context.service].check(context.body, outcome.body)
            elif outcome.why and not _may_know_why(association, context):
                return outcome._replace(why="")
            return outcome
        except PeerError as error:
            self.log("answer-rejected", uid=association.uid, pid=association.pid, why=str(error))
            return refusal("bad-answer")

    def _finish(self, contexts: Contexts, context: Context, outcome: Answer | Refusal) -> None:
        """Frees a context that is done and settles its request."""
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
        """Returns the counters of a uid. At _COUNTED uids, those without a daemon are merged into GONE first."""
        counts = counters.get(uid)
        if counts is None:
            if len(counters) >= _COUNTED:
                gone = counters.setdefault(GONE, Counter())
                for one in [one for one in counters if one != GONE and self.registry.get(one) is None]:
                    gone.update(counters.pop(one))
            counts = counters[uid] = Counter()
        return counts

    def notice(self, uid: int, service: str, requester: Requester, body: bytes) -> str:
        """Sends a notice, which has no answer, to the daemon of `uid`. `service`: any name; `body`: at most MAX_BODY
        bytes, otherwise PeerError. Does not block.

        Returns "" if it is in the daemon's socket, otherwise "no-daemon" or "daemon-full" (retry later).
        """
        association = self.registry.get(uid)
        if association is None:
            return "no-daemon"
        if association.leaving:
            return "daemon-full"  # a newer daemon may register soon
        try:
            taken = association.link.send(pack_request_of(NOTICE, 0, 0, service, requester, 0, body, False))
        except ConnectionError:
            self.gone(association)
            return "no-daemon"
        return "" if taken else "daemon-full"

    # --- daemons -------------------------------------------------------------------------------------------

    def refuses(self, uid: int) -> str:
        """Returns the reason why a daemon of this uid may not register now (one of REASONS); "" if it may.

        One that replaces the uid's daemon always may: the number of daemons stays the same."""
        registry = self.registry
        if uid == ROOT or registry.get(uid) is not None:
            return ""
        person = self.person_of(uid)
        if len(registry) >= self.limits.daemons:
            return "too-many-daemons"
        return "too-many-daemons" if self.daemons_of(person) >= self.limits.daemons_per_person else ""

    def daemons_of(self, person: int) -> int:
        """Returns how many daemons are registered for the uids of a person."""
        return sum(1 for one in self.registry if one.uid != ROOT and self.person_of(one.uid) == person)

    def helo(self, uid: int, pid: int, portid: int, link: Link, now: float, began: int = 0) -> Association:
        """Registers a daemon. Sends QUIT to an older one of the same uid, and its pending requests to the new one.

        `uid`, `pid`: its credentials as the kernel reports them. `portid`: for people only. `began`: its start time,
        for self-deadlock detection. The caller has checked `refuses`. Calls `on_registered`.
        """
        association = Association(uid, pid, portid, link, now, began)
        contexts = self._contexts.get(uid)
        if contexts is None:
            contexts = self._contexts[uid] = Contexts(uid, self._shares, self._random_u32())
        old = self.registry.helo(association)
        if old is not None:
            self.log("daemon-replaced", uid=uid, pid=old.pid, by=pid)
            self._send_quit(old)
            old.link.close()
        for context in contexts.allocated:
            if self.registry.get(uid) is association:
                self._send(association, contexts, context)
        for service, requester, body, origin, deadline, line in self._parked.pop(uid, ()):
            self.ask(uid, service, requester, body, origin, now, deadline, line)
        if self.registry.get(uid) is association:  # it may have gone while pending requests were sent to it
            for tell in self.on_registered:
                tell(uid)
        return association

    def quit(self, association: Association) -> None:
        """Handles a daemon's QUIT: sends it no more requests, and unregisters it once none of its own is pending."""
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
            self.log("quit-failed", uid=association.uid, pid=association.pid)

    def gone(self, association: Association) -> None:
        """Unregisters a daemon that has ended, and refuses its pending requests at once. Calls `on_gone`."""
        if self.registry.remove(association):
            self.refuse_all(association.uid, "daemon-gone")
            del self._contexts[association.uid]
        association.link.close()
        if self.registry.get(association.uid) is None:
            for tell in self.on_gone:
                tell(association.uid)

    def refuse_all(self, uid: int, reason: str) -> None:
        """Refuses all pending requests of the uid's daemon."""
        contexts = self._contexts.get(uid)
        if contexts is None:
            return
        for context in contexts.allocated:
            contexts.withdraw(context)
            self._finish(contexts, context, refusal(reason))

    def close(self) -> None:
        """Refuses all pending and waiting requests with "closing". Called when the broker ends."""
        for uid in tuple(self._contexts):
            self.refuse_all(uid, "closing")
        for uid in tuple(self._parked):
            self.given_up(uid, "closing")

    # --- time ----------------------------------------------------------------------------------------------

    def next_wake(self) -> float:
        """Returns when `expire` must be called at the latest, in seconds of CLOCK_MONOTONIC; inf if never."""
        return self._wake

    def expire(self, now: float) -> None:
        """Refuses requests whose deadline has passed: with "timed-out", or "no-daemon" if no daemon has started."""
        if now < self._wake:
            return
        self._wake = math.inf
        for uid, contexts in tuple(self._contexts.items()):
            for context in contexts.expired(now):
                self.log("request-timed-out", uid=uid, index=context.index, service=context.service)
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

    # --- status --------------------------------------------------------------------------------------------

    def contexts_of(self, uid: int) -> Contexts | None:
        """Returns the message contexts of a uid; None if it has no daemon."""
        return self._contexts.get(uid)

    def status(self, now: float, uid: int | None = None) -> dict[str, object]:
        """Returns registered daemons, pending requests and counters of one uid, or of all, as plain data."""
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


def _may_know_why(association: Association, context: Context) -> bool:
    """Returns whether the requester gets a refusal's `why`: a process that wants it, of the daemon's own uid."""
    origin = context.origin
    return origin is not None and origin.wants_why and association.uid == context.requester.uid
