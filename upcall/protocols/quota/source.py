"""The quota conversation in the broker's loop: reads what the kernel says, hands it to the clerk, delivers notices.

The kernel's messages are taken in crowds: after more than a few, the socket, whose buffer holds 43,000, is left
alone for a moment. So a flood costs one recvfrom and one count per message, and hardly a wake-up. All this is done in
the loop: a thread of its own would fight with it for the interpreter's lock at every message.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import UsageError
from upcall.core.messages import Requester
from upcall.core.router import Router
from upcall.kernel.genetlink import Ids, Listener, NoFamily, look_up, with_room
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.source import Source
from upcall.protocols.quota import notice as quotanotice
from upcall.protocols.quota import warning as quota
from upcall.protocols.quota.coalescing import Folding
from upcall.protocols.quota.notice import USER, QuotaNotice
from upcall.protocols.quota.policy import SYSTEM
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.system import Kernel, World
from upcall.protocols.quota.worker import Arrived, Clerk, Deliver, Done, Lost, Stop, Warnings

_AT_ONCE: Final = 1024  # messages in a turn
_FEW: Final = 8  # in a turn; if there were more, many more come
_PAUSE: Final = 0.01  # seconds until the next turn of many
_HAND_OVER: Final = 0.05  # seconds between two tables for the clerk
_SURE: Final = 1.0  # seconds until a gap is a loss: two processors of the kernel may overtake each other
_DELIVERIES: Final = 32  # in a turn
_ASK_AGAIN: Final = 30.0  # seconds until the kernel is asked again, after it could not be
_LAST_WORDS: Final = 2.0  # seconds that the clerk has for its end

Open = Callable[[Ids], Listener]


class QuotaSetup(NamedTuple):
    """What `Quota` needs. `ids`: None looks them up later, without keeping the broker waiting."""

    rules: Rules
    state: Path
    ids: Ids | None = None
    world: World | None = None
    listen: Open = lambda ids: Listener(ids.group)


def with_room_kept(setup: QuotaSetup) -> QuotaSetup:
    """The socket is made now, while we have the right to its large buffer (CAP_NET_ADMIN); whoever must listen again
    gets what the system allows everybody."""
    try:
        kept = [with_room()]
    except OSError:  # no netlink here: listening will say so
        return setup
    return setup._replace(listen=lambda ids: Listener(ids.group, made=kept.pop() if kept else None))


class _Opened(NamedTuple):
    """From the thread to the loop: the listener, or why there is none."""

    listener: Listener | None
    family: int
    why: str


class Quota(Source):
    """Belongs to the loop's thread. The clerk's thread speaks to it by `_post` only."""

    name = "quota"

    def __init__(self, loop: Loop, router: Router, log: EventLog, setup: QuotaSetup) -> None:
        super().__init__(loop, router, log)
        self._setup = setup
        self.counts: Counter[str] = Counter()
        self.why = "not listening yet"
        self._listener: Listener | None = None
        self._folding = Folding(0)
        self._closing = threading.Event()
        self._busy = False  # the clerk has a table in hand
        self._not_before = 0.0  # when it may have the next one
        self._lost_said = self._overflows_said = 0
        self._lost_since = math.inf
        self._outbox: deque[Deliver | Done | _Opened] = deque()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        loop.add(self._reader, self._on_post, URGENT)
        world = setup.world or Kernel()
        self.clerk = Clerk(setup.rules, world, setup.state, self._post, log)
        self._thread = threading.Thread(target=self._run, name="quota", daemon=True)
        self._thread.start()
        router.on_registered.append(self._on_helo)
        self._timer = loop.timer(self.wake)

    @property
    def lives(self) -> bool:
        """Whether the clerk is there for what we hand over. It may take its time: directories of names are slow."""
        return bool(self.why) or self._thread.is_alive()

    # --- in the clerk's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        why = ""
        while not self._closing.is_set():
            try:
                ids = self._setup.ids or look_up(quota.FAMILY, quota.GROUP)
                listener = self._setup.listen(ids)
            except (UsageError, OSError) as error:
                if str(error) != why:
                    why = str(error)
                    self._post(_Opened(None, 0, why))
                if isinstance(error, NoFamily):
                    return
                self._closing.wait(_ASK_AGAIN)  # a machine that boots may have been too busy
            else:
                self._post(_Opened(listener, ids.family, ""))
                self.clerk.run()
                return

    def _post(self, item: Deliver | Done | _Opened) -> None:
        self._outbox.append(item)
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody listens any more
            self._writer.send(b"x")

    # --- what the kernel says --------------------------------------------------------------------------------

    def _on_opened(self, item: _Opened) -> None:
        if item.listener is None:
            self.why = item.why
            self.log("quota-off", why=item.why)
            return
        self.why = ""
        self._listener, self._folding = item.listener, Folding(item.family)
        self.loop.add(item.listener, self._on_readable, URGENT)
        self.log("quota-listening", buffer=item.listener.room)

    def _on_readable(self) -> None:
        assert self._listener is not None  # noqa: S101 - it is in the loop
        try:
            datagrams = self._listener.receive(_AT_ONCE, quota.MAX_MESSAGE)
        except OSError as error:
            self.log("quota-unreadable", why=error)
            self.loop.mute(self._listener, self.loop.now + 1)
            return
        self._folding.add(datagrams)
        if self._listener.overflows > self._overflows_said:
            self._overflows_said = self._listener.overflows
            self.clerk.inbox.put(Lost(0))  # how many is known as soon as another one comes, which may be long
        if len(datagrams) > _FEW:
            self.loop.mute(self._listener, self.loop.now + _PAUSE)
        self.wake(self.loop.now)

    def _hand_over(self, now: float) -> None:
        if self._busy or now < self._not_before or not len(self._folding):
            return
        self._busy, self._not_before = True, now + _HAND_OVER
        self.clerk.inbox.put(Warnings(self._folding.take()))

    def _look_for_loss(self, now: float) -> None:
        lost = self._folding.sequence.lost + self._folding.dropped
        if lost <= self._lost_said:
            self._lost_since = math.inf
        elif self._lost_since == math.inf:
            self._lost_since = now
        elif now >= self._lost_since + _SURE:
            self.log("quota-lost", messages=lost - self._lost_said)
            self.clerk.inbox.put(Lost(lost - self._lost_said))
            self._lost_said, self._lost_since = lost, math.inf

    def wake(self, now: float) -> None:
        self._look_for_loss(now)
        self._hand_over(now)
        hand_over = self._not_before if len(self._folding) and not self._busy else math.inf
        self._timer.at(min(hand_over, self._lost_since + _SURE))

    # --- what the clerk says ---------------------------------------------------------------------------------

    def _on_post(self) -> None:
        self._reader.recv(4096)
        for _ in range(_DELIVERIES):
            if not self._outbox:
                return
            self._take(self._outbox.popleft())
        if self._outbox:
            with contextlib.suppress(BlockingIOError):
                self._writer.send(b"x")

    def _take(self, item: Deliver | Done | _Opened) -> None:
        if isinstance(item, Deliver):
            missed = self._deliver(item)
            if missed is not None:
                self.clerk.inbox.put(missed)
        elif isinstance(item, Done):
            self._busy = False
            self.wake(self.loop.now)
        else:
            self._on_opened(item)

    def _deliver(self, item: Deliver) -> Deliver | None:
        """To everybody's own daemon, or the machine's for those who have none. Gives what reached nobody."""
        notice, registry, daemon = item.notice, self.router.registry, self._daemon
        told = {uid for uid in item.to if self._tell(uid, notice)}
        homeless = [uid for uid in item.to if uid not in told and registry.get(daemon(uid)) is None]
        copy = self._setup.rules.copy_to_system and notice.subject.kind == USER and not item.again
        if (homeless or copy) and SYSTEM not in item.to and self._tell(SYSTEM, notice):
            told.add(SYSTEM)
        missed = [uid for uid in item.to if uid not in told and not (uid in homeless and SYSTEM in told)]
        if not missed:
            return None
        return Deliver(notice, tuple(missed), full=any(uid not in homeless for uid in missed))

    def _daemon(self, uid: int) -> int:
        """The uid of the daemon that tells this person. Root's own has no sinks: they speak with the network."""
        return self.router.machine if uid == SYSTEM else uid

    def _tell(self, uid: int, notice: QuotaNotice) -> bool:
        requester = Requester(notice.cause.uid or 0, 0)
        told = self.router.notice(self._daemon(uid), quotanotice.SERVICE, requester, quotanotice.pack(notice))
        self.counts["delivered"] += told
        return told

    def _on_helo(self, uid: int) -> None:
        if uid == self.router.machine:
            self.clerk.inbox.put(Arrived(SYSTEM))
        if uid not in (SYSTEM, self.router.machine):
            self.clerk.inbox.put(Arrived(uid))

    # --- the end, and seeing ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Delivers what can be delivered, and remembers the rest."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._folding.add(self._listener.receive(_AT_ONCE, quota.MAX_MESSAGE))
            self.clerk.inbox.put(Warnings(self._folding.take()))
        self._closing.set()
        self.clerk.inbox.put(Stop())
        self._thread.join(_LAST_WORDS)
        ended = not self._thread.is_alive()
        while self._outbox:
            item = self._outbox.popleft()
            if isinstance(item, _Opened):
                if item.listener is not None:
                    item.listener.close()
            elif isinstance(item, Deliver) and (missed := self._deliver(item)) and ended:
                for uid in missed.to:
                    self.clerk.kept.put(uid, missed.notice)
        if not ended:
            self.log("quota-clerk-waits", why="it is still asking the system for something")
        elif self._listener is not None:
            self.clerk.save()
        if self._listener is not None:
            self.loop.remove(self._listener)
            self._listener.close()
        self.loop.remove(self._reader)
        self._reader.close()
        self._writer.close()

    def status(self, uid: int | None) -> dict[str, object]:
        return {} if uid is not None else {"quota": self._figures()}

    def _figures(self) -> dict[str, object]:
        """Counts since the start; `undelivered` is what waits, `readings`: how often all quotas were read."""
        folding, listener = self._folding, self._listener
        return {
            "listening": listener is not None,
            "why": self.why,
            "received": folding.received,
            "folded": folding.folded,
            "dropped": folding.dropped,
            "lost": folding.sequence.lost,
            "overflows": listener.overflows if listener else 0,
            "nonsense": folding.nonsense + self.clerk.unknown + (listener.foreign if listener else 0),
            "delivered": self.counts["delivered"],
            "undelivered": len(self.clerk.kept) + len(self.clerk.full),
            "watched": len(self.clerk.core),
            "readings": self.clerk.readings,
            "filesystems": sorted(mount.point for mount in tuple(self.clerk.filesystems.values())),
        }
