"""Message contexts: an array of fixed size, as in eCryptfs's messaging.c, with the same four conditions on a reply.

A request takes a free context, is sent under a fresh sequence number, and is pending; the reply that fits on
index, state, sequence, uid and pid makes it done; freeing it is the end. Whoever takes a context out of
*pending* has the right, and the duty, to answer. Pure: time comes in as seconds, nothing is sent from here.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from upcall.core.errors import UpcallError
from upcall.core.messages import Answer, Refusal, Requester

COUNTERS = 1 << 32  # a sequence number is a u32 on the wire

Line = frozenset[tuple[int, int]]  # (pid, beginning) of a process and of those from whom it descends
NO_LINE: Line = frozenset()


class State(enum.Enum):
    FREE = "free"
    PENDING = "pending"
    DONE = "done"


class NoContext(UpcallError):
    """Every context of this service is in use: an error at once, as in the kernel (-ENOMEM)."""


class Exhausted(UpcallError):
    """Every sequence number of this run has been used once; none may be used again."""


class Rejected(UpcallError):
    """A reply that does not fit; `on` is "index", "state", "sequence", "uid" or "pid"."""

    def __init__(self, on: str) -> None:
        self.on = on
        super().__init__(f"the reply's {on} does not fit")


class Origin(Protocol):
    """Whoever asked: takes the outcome, exactly once, and turns it into what that side understands."""

    def settle(self, outcome: Answer | Refusal, /) -> None: ...


_NOBODY = Requester(0, 0)


class Context:
    """One slot of the array while it is in use. Everything but `index` belongs to the request that is in it."""

    __slots__ = (
        "body",
        "counter",
        "deadline",
        "index",
        "line",
        "origin",
        "pid",
        "requester",
        "service",
        "since",
        "state",
    )

    def __init__(self, index: int, service: str) -> None:
        self.index, self.service = index, service
        self.state = State.FREE
        self.counter = self.pid = 0
        self.requester = _NOBODY
        self.line = NO_LINE
        self.since = self.deadline = 0.0
        self.body = b""
        self.origin: Origin | None = None

    def clear(self) -> None:
        """It is over: what was asked is held no longer, nobody is told of an outcome, and no reply fits."""
        self.state = State.FREE
        self.counter, self.service, self.body, self.origin = 0, "", b"", None

    def __repr__(self) -> str:
        return f"<Context {self.index} {self.state.value} seq={self.counter} service={self.service!r}>"


class Contexts:
    """The array of one uid. `shares` says how many contexts each service has: one cannot starve another.

    The array's size is fixed; a slot takes memory while it is in use. A free index is used again as late as possible.
    """

    def __init__(self, uid: int, shares: Mapping[str, int], start: int = 0) -> None:
        """`start`: what the sequence numbers count up from (modulo 2^32); random, so that a reply to a
        broker that is gone does not fit its successor."""
        self.uid = uid
        self._fresh: dict[str, range] = {}  # by service: indexes that were never used
        self._freed: dict[str, deque[int]] = {}  # by service: indexes to use again, once none is fresh
        self._size = 0
        for service, share in shares.items():
            if share < 1:
                raise ValueError(f"service {service!r} needs at least one context")
            self._fresh[service] = range(self._size, self._size + share)
            self._size += share
        self._allocated: dict[int, Context] = {}  # by index, oldest first
        self._start = start % COUNTERS
        self._used = 0
        self.rejected: Counter[str] = Counter()
        self.most = 0  # the most that were ever in use at once

    def __len__(self) -> int:
        return self._size

    @property
    def allocated(self) -> Iterator[Context]:
        """Those in use, oldest first."""
        return iter(tuple(self._allocated.values()))

    @property
    def in_use(self) -> int:
        return len(self._allocated)

    def left(self, service: str) -> int:
        """How many contexts the service has free."""
        return len(self._fresh[service]) + len(self._freed.get(service, ()))

    def acquire(self, service: str) -> Context:
        """A free context. NoContext when the service's share is used up; KeyError if unknown."""
        fresh = self._fresh[service]
        if fresh:
            index, self._fresh[service] = fresh[0], fresh[1:]
        elif freed := self._freed.get(service):
            index = freed.popleft()
        else:
            raise NoContext(service)
        context = self._allocated[index] = Context(index, service)
        if len(self._allocated) > self.most:
            self.most = len(self._allocated)
        return context

    def send(self, context: Context, pid: int) -> int:
        """Makes it pending for the daemon `pid` under a sequence number never used before; gives that number.

        Sending a pending one again (to the daemon's successor) voids the earlier number.
        """
        if self._used >= COUNTERS:
            raise Exhausted(f"uid {self.uid} has used {COUNTERS} sequence numbers")
        self._used += 1
        context.counter = (self._start + self._used) % COUNTERS
        context.pid = pid
        context.state = State.PENDING
        return context.counter

    def match(self, index: int, seq: int, uid: int, pid: int) -> Context:
        """The pending context that this reply is for; it is done now. Rejected, and counted, otherwise."""
        if not 0 <= index < self._size:
            raise self._reject("index")
        context = self._allocated.get(index)
        if context is None or context.state is not State.PENDING:
            raise self._reject("state")
        if uid != self.uid:
            raise self._reject("uid")
        if pid != context.pid:
            raise self._reject("pid")
        if seq != context.counter:
            raise self._reject("sequence")
        context.state = State.DONE
        return context

    def _reject(self, on: str) -> Rejected:
        self.rejected[on] += 1
        return Rejected(on)

    def withdraw(self, context: Context) -> None:
        """Takes a context away from whoever was to answer it: the caller answers instead."""
        context.state = State.DONE

    def expired(self, now: float) -> list[Context]:
        """Those pending past their deadline, each withdrawn; the caller answers and frees them."""
        late = [c for c in self._allocated.values() if c.state is State.PENDING and c.deadline <= now]
        for context in late:
            self.withdraw(context)
        return late

    def next_deadline(self) -> float | None:
        """When `expired` is worth calling again; None while nothing is pending."""
        return min((c.deadline for c in self._allocated.values() if c.state is State.PENDING), default=None)

    def free(self, context: Context) -> None:
        """Wipes it of its request; its index is free. Only what is allocated can be freed."""
        if self._allocated.get(context.index) is not context:
            raise ValueError(f"{context!r} is not in use")
        del self._allocated[context.index]
        freed = self._freed.get(context.service)
        if freed is None:
            freed = self._freed[context.service] = deque()
        freed.append(context.index)
        context.clear()
