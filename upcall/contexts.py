"""Message contexts: a fixed array, as in eCryptfs's messaging.c, with the same four conditions on a reply.

A request takes a free context, is sent under a fresh sequence number, and is pending; the reply that fits on
index, state, sequence, uid and pid makes it done; freeing it is the end. Whoever takes a context out of
*pending* has the right, and the duty, to answer. Pure: time comes in as seconds, nothing is sent from here.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from upcall.errors import UpcallError
from upcall.messages import Answer, Refusal, Requester

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


class Context:
    """One slot of the array. Everything but `index` belongs to the request that is in it."""

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

    def __init__(self, index: int) -> None:
        self.index = index
        self._clear()

    def _clear(self) -> None:
        self.state = State.FREE
        self.counter = 0
        self.pid = 0
        self.service = ""
        self.requester = Requester(0, 0)
        self.line = NO_LINE
        self.since = self.deadline = 0.0
        self.body = b""
        self.origin: Origin | None = None

    def __repr__(self) -> str:
        return f"<Context {self.index} {self.state.value} seq={self.counter} service={self.service!r}>"


class Contexts:
    """The array of one uid. `shares` says how many contexts each service has: one cannot starve another."""

    def __init__(self, uid: int, shares: Mapping[str, int], start: int = 0) -> None:
        """`start`: what the sequence numbers count up from (modulo 2^32); random, so that a reply to a
        broker that is gone does not fit its successor."""
        self.uid = uid
        self._free: dict[str, deque[Context]] = {}
        array: list[Context] = []
        for service, share in shares.items():
            if share < 1:
                raise ValueError(f"service {service!r} needs at least one context")
            mine = [Context(len(array) + i) for i in range(share)]
            self._free[service] = deque(mine)
            array += mine
        self._array = tuple(array)
        self._allocated: dict[int, Context] = {}
        self._start = start % COUNTERS
        self._used = 0
        self.rejected: Counter[str] = Counter()
        self.most = 0  # the most that were ever in use at once

    def __len__(self) -> int:
        return len(self._array)

    @property
    def allocated(self) -> Iterator[Context]:
        """Those in use, oldest first."""
        return iter(tuple(self._allocated.values()))

    @property
    def in_use(self) -> int:
        return len(self._allocated)

    def left(self, service: str) -> int:
        """How many contexts the service has free."""
        return len(self._free[service])

    def acquire(self, service: str) -> Context:
        """A context off the free list. NoContext when the service's share is used up; KeyError if unknown."""
        free = self._free[service]
        if not free:
            raise NoContext(service)
        context = free.popleft()
        context.service = service
        self._allocated[context.index] = context
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
        if not 0 <= index < len(self._array):
            raise self._reject("index")
        context = self._array[index]
        if context.state is not State.PENDING:
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
        """Back onto the free list, wiped of its request. Only what is allocated can be freed."""
        if self._allocated.pop(context.index, None) is not context:
            raise ValueError(f"{context!r} is not in use")
        service = context.service
        context._clear()
        self._free[service].append(context)
