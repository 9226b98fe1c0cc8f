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

from upcall.contexts import Context, Contexts, Exhausted, NoContext, Origin, Rejected
from upcall.errors import REASONS, PeerError
from upcall.messages import Answer, Refusal, Requester
from upcall.registry import Association, Link, Registry
from upcall.service import Service
from upcall.wire.netlink import (
    QUIT,
    Envelope,
    pack_control,
    pack_request,
    refusal,
    response_position,
    take_response,
)

Log = Callable[..., None]


class Broker:
    """`services`: what may be asked. `log(event, **fields)` never blocks. Times are seconds, monotonic."""

    def __init__(self, services: Mapping[str, Service], log: Log) -> None:
        self.services = services
        self.registry = Registry()
        self.log = log
        # by uid: how often each service ended in "answered", or in which reason
        self.outcomes: dict[int, Counter[tuple[str, str]]] = {}
        self.rejected: dict[int, Counter[str]] = {}  # by uid: replies that fitted no context, and on what
        self._contexts: dict[int, Contexts] = {}
        self._shares = {service.name: service.contexts for service in services.values()}
        self._wake = math.inf

    # --- requests ------------------------------------------------------------------------------------------

    def ask(
        self, uid: int, service: str, requester: Requester, body: bytes, origin: Origin, now: float,
        deadline: float = math.inf,
    ) -> None:  # fmt: skip
        """A request for the daemon of `uid`. Settled now or before the earlier of `deadline` and patience."""
        association = self.registry.get(uid)
        if association is None or association.leaving:
            return self._settle(uid, service, origin, refusal("no-daemon"))
        contexts = self._contexts[uid]
        rules = self.services[service]
        try:
            if rules.reserve and len(self.registry) > 1 and contexts.left(service) <= rules.reserve:
                raise NoContext(service)
            context = contexts.acquire(service)
        except NoContext:
            return self._settle(uid, service, origin, refusal("no-context"))
        context.origin, context.body, context.requester = origin, body, requester
        context.since = now
        context.deadline = min(deadline, now + rules.patience)
        self._wake = min(self._wake, context.deadline)
        self._send(association, contexts, context)
        return None

    def _send(self, association: Association, contexts: Contexts, context: Context) -> None:
        """Hands a context to a daemon, or settles it if that cannot be."""
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
            self.rejected.setdefault(association.uid, Counter())[on] += 1
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
        service, origin = context.service, context.origin
        contexts.free(context)
        if origin is not None:
            self._settle(contexts.uid, service, origin, outcome)

    def _settle(self, uid: int, service: str, origin: Origin, outcome: Answer | Refusal) -> None:
        origin.settle(outcome)
        name = "answered"
        if isinstance(outcome, Refusal):
            name = outcome.reason if outcome.reason in REASONS else "other"
        counts = self.outcomes.get(uid)
        if counts is None:
            counts = self.outcomes[uid] = Counter()
        counts[service, name] += 1

    # --- daemons -------------------------------------------------------------------------------------------

    def helo(self, uid: int, pid: int, portid: int, link: Link, now: float) -> Association:
        """A daemon registers. An older one of the same uid is sent QUIT; what it held goes to the new one."""
        association = Association(uid, pid, portid, link, now)
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

    def refuse_all(self, uid: int, reason: str) -> None:
        """Refuses everything that the uid's daemon was asked."""
        contexts = self._contexts.get(uid)
        if contexts is None:
            return
        for context in contexts.allocated:
            contexts.withdraw(context)
            self._finish(contexts, context, refusal(reason))

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
        return {"daemons": daemons, "outcomes": outcomes, "rejected": dict(rejected)}
