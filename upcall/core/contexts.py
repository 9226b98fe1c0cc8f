"""Keeps pending requests in a fixed array of message contexts and matches replies to them.

A request acquires a free context, is sent under a new sequence number, and is pending. A reply that matches in index,
state, sequence, uid and pid makes it done. The code that takes a context out of *pending* must settle its request,
and only that code may: so each request is answered once.

Pure: times are arguments, in seconds of CLOCK_MONOTONIC; nothing is sent from here. Not thread-safe.
Source: fs/ecryptfs/messaging.c of Linux 2.6.27, which checks the same conditions.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from upcall.core.errors import UpcallError
from upcall.core.messages import Answer, Refusal, Requester

COUNTERS = 1 << 32  # a sequence number is a u32 on the wire

Line = frozenset[tuple[int, int]]  # (pid, start time) of a process and of each of its ancestors
NO_LINE: Line = frozenset()


class State(enum.Enum):
    """The state of a message context. Pending: sent to a daemon and not yet answered."""

    FREE = "free"
    PENDING = "pending"
    DONE = "done"


class NoContext(UpcallError):
    """Every context of this service is in use. Raised at once, without waiting, as in the kernel (-ENOMEM)."""


class Exhausted(UpcallError):
    """All 2^32 sequence numbers of this array have been used. None is reused, so that no old reply can match."""


class Rejected(UpcallError):
    """A reply matches no pending context. `on`: which check failed: "index", "state", "sequence", "uid" or "pid"."""

    def __init__(self, on: str) -> None:
        self.on = on
        super().__init__(f"the reply's {on} does not fit")


class Origin(Protocol):
    """The requester's side of a request: takes its outcome and translates it for the requester's interface.

    `wants_why`: a refusal may carry the daemon's `why`. Only for processes; False for the kernel's requests."""

    wants_why: bool

    def settle(self, outcome: Answer | Refusal, /) -> None:
        """Delivers the outcome. The router calls it exactly once per request, in the loop's thread.

        It may be called before `Router.ask` returns. It must not block and must not raise: a requester that has
        gone is ignored. An Answer's body has passed the check of its service.
        """


_NOBODY = Requester(0, 0)
_FREE, _PENDING, _DONE = State.FREE, State.PENDING, State.DONE  # a look-up in an enumeration costs on the hot path


class Context:
    """One slot of the array while it is in use. All but `index` describes the request in it.

    `counter`: the sequence number under which it was sent. `pid`: the daemon that must reply. `line`: the requesting
    process and its ancestors, for self-deadlock detection. `since`, `deadline`: seconds of CLOCK_MONOTONIC.
    """

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
        self.state = _FREE
        self.counter = self.pid = 0
        self.requester = _NOBODY
        self.line = NO_LINE
        self.since = self.deadline = 0.0
        self.body = b""
        self.origin: Origin | None = None

    def clear(self) -> None:
        """Drops the request: body and origin are released, and no reply matches any more."""
        self.state = _FREE
        self.counter, self.service, self.body, self.origin = 0, "", b"", None

    def __repr__(self) -> str:
        return f"<Context {self.index} {self.state.value} seq={self.counter} service={self.service!r}>"


class Contexts:
    """The message contexts of one uid. Each service has a share of its own, so that none can starve another.

    The array's size is fixed; a slot takes memory only while it is in use. Freed indexes are reused oldest first, so
    that a late reply rarely meets a reused index.
    """

    def __init__(self, uid: int, shares: Mapping[str, int], start: int = 0) -> None:
        """`shares`: contexts per service name, each at least 1, otherwise ValueError. `start`: sequence numbers count
        up from here, modulo 2^32. Pass a random one, so that a reply to an earlier broker does not match."""
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
        """The contexts in use, oldest first. A snapshot: contexts may be freed while iterating."""
        return iter(tuple(self._allocated.values()))

    @property
    def in_use(self) -> int:
        """The number of contexts in use."""
        return len(self._allocated)

    def left(self, service: str) -> int:
        """Returns how many contexts the service has free. KeyError if the service is unknown."""
        return len(self._fresh[service]) + len(self._freed.get(service, ()))

    def acquire(self, service: str) -> Context:
        """Takes a free context of the service. NoContext if its share is used up; KeyError if it is unknown."""
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
        """Makes the context pending for the daemon `pid`; returns a sequence number that was never used before.

        Sending a pending context again, to the daemon's successor, invalidates the earlier number. Exhausted if all
        numbers were used.
        """
        if self._used >= COUNTERS:
            raise Exhausted(f"uid {self.uid} has used {COUNTERS} sequence numbers")
        self._used += 1
        context.counter = (self._start + self._used) % COUNTERS
        context.pid = pid
        context.state = _PENDING
        return context.counter

    def match(self, index: int, seq: int, uid: int, pid: int) -> Context:
        """Returns the pending context that a reply is for and makes it done. `uid`, `pid`: the sender's credentials,
        as the kernel reports them. Rejected if any of the checks fails; the failure is counted in `rejected`."""
        if not 0 <= index < self._size:
            raise self._reject("index")
        context = self._allocated.get(index)
        if context is None or context.state is not _PENDING:
            raise self._reject("state")
        if uid != self.uid:
            raise self._reject("uid")
        if pid != context.pid:
            raise self._reject("pid")
        if seq != context.counter:
            raise self._reject("sequence")
        context.state = _DONE
        return context

    def _reject(self, on: str) -> Rejected:
        self.rejected[on] += 1
        return Rejected(on)

    def withdraw(self, context: Context) -> None:
        """Makes the context done without a reply. The caller must settle it, and free it."""
        context.state = _DONE

    def expired(self, now: float) -> list[Context]:
        """Withdraws and returns the contexts whose deadline has passed. The caller must settle and free each."""
        late = [c for c in self._allocated.values() if c.state is _PENDING and c.deadline <= now]
        for context in late:
            self.withdraw(context)
        return late

    def next_deadline(self) -> float | None:
        """Returns the earliest deadline of the pending contexts; None if none is pending."""
        return min((c.deadline for c in self._allocated.values() if c.state is _PENDING), default=None)

    def free(self, context: Context) -> None:
        """Clears the context and makes its index available. ValueError if it is not in use."""
        if self._allocated.get(context.index) is not context:
            raise ValueError(f"{context!r} is not in use")
        del self._allocated[context.index]
        freed = self._freed.get(context.service)
        if freed is None:
            freed = self._freed[context.service] = deque()
        freed.append(context.index)
        context.clear()
