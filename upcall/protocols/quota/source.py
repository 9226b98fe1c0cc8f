"""The quota source: reads the kernel's warnings, passes them to the worker, has the broker deliver the notices.

Runs in the loop of a process of its own. Messages are read in batches: after more than a few, the socket, whose buffer
holds 43,000, is muted for a moment. So a flood costs one recvfrom and one increment per message, and few wake-ups.
Reading is done in the loop, because a thread would contend with it for the interpreter's lock at every message.

A notice counts as delivered when the broker has answered it. One that was sent and not answered when the connection
ended is sent again on the next: a daemon gets it twice if the broker was killed between sending it and answering.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import PeerError, UsageError, error_words
from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel.genetlink import Ids, Listener, NoFamily, look_up, with_room
from upcall.process.loop import URGENT, Loop
from upcall.process.paths import Place
from upcall.process.source_link import LOST, SourceLink
from upcall.protocols.quota import notice as quotanotice
from upcall.protocols.quota import warning as quota
from upcall.protocols.quota.coalescing import Folding
from upcall.protocols.quota.notice import USER
from upcall.protocols.quota.policy import SYSTEM
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.system import Kernel, World
from upcall.protocols.quota.worker import Arrived, Clerk, Deliver, Delivered, Done, Lost, Seen, Stop, Warnings

_AT_ONCE: Final = 1024  # messages in a turn
_FEW: Final = 8  # messages in a turn; more than these indicate a burst
_PAUSE: Final = 0.01  # seconds to mute the socket in a burst
_HAND_OVER: Final = 0.05  # seconds between two tables for the worker
_SURE: Final = 1.0  # seconds until a gap counts as a loss: processors may deliver messages out of order
_POSTED: Final = 32  # items from the worker in a turn
_IN_FLIGHT: Final = 64  # notices that the broker has not answered yet
_SEND_AGAIN: Final = 0.05  # seconds until a full socket to the broker is tried again
_WITHOUT_BROKER, _WITH_BROKER = 256, 16384  # deliveries that wait here; more are returned to the worker
_MOUNTS: Final = 4096  # bytes of mount points in a status
_ASK_AGAIN: Final = 30.0  # seconds until listening is retried
_LAST_WORDS: Final = 2.0  # seconds at shutdown for the worker's end, and then for the broker's answers

Open = Callable[[Ids], Listener]


class QuotaSetup(NamedTuple):
    """The arguments of `QuotaSource`. `ids`: of the netlink family; None: looked up in the worker's thread."""

    rules: Rules
    state: Path
    ids: Ids | None = None
    world: World | None = None
    listen: Open = lambda ids: Listener(ids.group)


def with_room_kept(setup: QuotaSetup) -> QuotaSetup:
    """Opens the socket now, while the process has the right to a large buffer (CAP_NET_ADMIN). A later listener gets
    the size that the system allows everyone."""
    try:
        kept = [with_room()]
    except OSError:  # no netlink here: listening will fail with the reason
        return setup
    return setup._replace(listen=lambda ids: Listener(ids.group, made=kept.pop() if kept else None))


class _Opened(NamedTuple):
    """From the thread to the loop: the listener, or why it could not be opened."""

    listener: Listener | None
    family: int
    why: str


class _Delivery:
    """A notice that is being delivered. `outcomes`: by uid, "" or the reason why it was not delivered."""

    __slots__ = ("item", "left", "outcomes", "system")

    def __init__(self, item: Deliver) -> None:
        self.item = item
        self.left = len(item.to)  # outstanding outcomes
        self.outcomes: dict[int, str] = {}
        self.system = SYSTEM in item.to  # it is or was sent to the machine's daemon


class QuotaSource:
    """Runs in the loop's thread. The worker's thread calls `_post` only."""

    def __init__(self, loop: Loop, place: Place, log: Callable[..., None], setup: QuotaSetup) -> None:
        self._loop, self._log, self._setup = loop, log, setup
        self.counts: Counter[str] = Counter()
        self.superfluous = False  # the broker has another quota source
        self.hardening: Mapping[str, str] = {}  # the restrictions in effect, for the status
        self.why = "not listening yet"
        self._listener: Listener | None = None
        self._folding = Folding(0)
        self._closing = threading.Event()
        self._busy = False  # the worker is processing a table
        self._not_before = 0.0  # when the next one may be passed on
        self._lost_said = self._overflows_said = 0
        self._lost_since = math.inf
        self._deliveries: dict[int, _Delivery] = {}  # by number
        self._sends: deque[tuple[_Delivery, int]] = deque()  # notices and uids to send next
        self._in_flight = 0
        self._outbox: deque[Deliver | Done | Seen | _Opened] = deque()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        loop.add(self._reader, self._on_post, URGENT)
        self._timer = loop.timer(self.wake)
        self._sending = loop.timer(lambda _: self._send())
        world = setup.world or Kernel()
        self.clerk = Clerk(setup.rules, world, setup.state, self._post, log)
        self._thread = threading.Thread(target=self._run, name="quota", daemon=True)
        self.link = SourceLink(loop, place, quotanotice.SERVICE, log, self)
        self._thread.start()

    @property
    def lives(self) -> bool:
        """Whether the worker's thread runs, or never started. It may be slow: name services are."""
        return bool(self.why) or self._thread.is_alive()

    # --- in the worker's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        why = ""
        while not self._closing.is_set():
            try:
                ids = self._setup.ids or look_up(quota.FAMILY, quota.GROUP)
                listener = self._setup.listen(ids)
            except (UsageError, OSError) as error:
                if error_words(error) != why:
                    why = error_words(error)
                    self._post(_Opened(None, 0, why))
                if isinstance(error, NoFamily):
                    return
                self._closing.wait(_ASK_AGAIN)  # the look-up may have timed out during a boot
            else:
                self._post(_Opened(listener, ids.family, ""))
                self.clerk.run()
                return

    def _post(self, item: Deliver | Done | Seen | _Opened) -> None:
        self._outbox.append(item)
        with contextlib.suppress(OSError):  # full: the loop will wake anyway; closed: the source has ended
            self._writer.send(b"x")

    # --- warnings of the kernel ------------------------------------------------------------------------------

    def _on_opened(self, item: _Opened) -> None:
        if item.listener is None:
            self.why = item.why
            self._log("quota-listen-failed", why=item.why)
            return
        self.why = ""
        self._listener, self._folding = item.listener, Folding(item.family)
        self._loop.add(item.listener, self._on_readable, URGENT)
        self._log("quota-listening", buffer=item.listener.room)

    def _on_readable(self) -> None:
        assert self._listener is not None  # noqa: S101 - it is in the loop
        try:
            datagrams = self._listener.receive(_AT_ONCE, quota.MAX_MESSAGE)
        except OSError as error:
            self._log("quota-receive-failed", why=error)
            self._loop.mute(self._listener, time.monotonic() + 1)
            return
        self._folding.add(datagrams)
        if self._listener.overflows > self._overflows_said:
            self._overflows_said = self._listener.overflows
            self.clerk.inbox.put(Lost(0))  # the number is known only with the next message
        if len(datagrams) > _FEW:
            self._loop.mute(self._listener, time.monotonic() + _PAUSE)
        self.wake(time.monotonic())
        self.link.changed()

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
            self._log("quota-warnings-lost", messages=lost - self._lost_said)
            self.clerk.inbox.put(Lost(lost - self._lost_said))
            self._lost_said, self._lost_since = lost, math.inf

    def wake(self, now: float) -> None:
        """Passes warnings to the worker if it is idle, and reports losses. `now`: seconds of CLOCK_MONOTONIC."""
        self._look_for_loss(now)
        self._hand_over(now)
        hand_over = self._not_before if len(self._folding) and not self._busy else math.inf
        self._timer.at(min(hand_over, self._lost_since + _SURE))

    # --- items from the worker -------------------------------------------------------------------------------

    def _on_post(self) -> None:
        self._reader.recv(4096)
        for _ in range(_POSTED):
            if not self._outbox:
                break
            self._take(self._outbox.popleft())
        self._send()
        self.link.changed()
        if self._outbox:
            with contextlib.suppress(BlockingIOError):
                self._writer.send(b"x")

    def _take(self, item: Deliver | Done | Seen | _Opened) -> None:
        if isinstance(item, Deliver):
            self._deliver(item)
        elif isinstance(item, Done):
            self._busy = False
            self.wake(time.monotonic())
        elif isinstance(item, _Opened):
            self._on_opened(item)

    def _answer(self, item: Delivered) -> None:
        """Passes an outcome to the worker; handles it here if the worker's thread has ended."""
        if self._thread.is_alive():
            self.clerk.inbox.put(item)
        else:
            self.clerk.on_delivered(item)

    # --- delivery: to each uid's daemon, or to the machine's for uids without one -----------------------------

    def _deliver(self, item: Deliver) -> None:
        if len(self._deliveries) >= (_WITH_BROKER if self.link.connected else _WITHOUT_BROKER):
            self._answer(Delivered(item.number, item.to, full=self.link.connected))
            return
        delivery = self._deliveries[item.number] = _Delivery(item)
        self._sends.extend((delivery, uid) for uid in item.to)

    def _send(self) -> None:
        """Sends as many notices as the broker accepts now."""
        while self._sends and self._in_flight < _IN_FLIGHT and self.link.connected:
            delivery, uid = self._sends.popleft()
            notice = delivery.item.notice
            try:
                body = quotanotice.pack(notice)
            except PeerError as error:
                self._log("quota-notice-refused", uid=uid, why=error)
                self._on_outcome(delivery, uid, "")
                continue
            requester, settle = Requester(notice.cause.uid or 0, 0), functools.partial(self._settle, delivery, uid)
            if not self.link.notice(uid, quotanotice.SERVICE, requester, body, settle):
                self._sends.appendleft((delivery, uid))
                self._sending.at(time.monotonic() + _SEND_AGAIN)
                return
            self._in_flight += 1

    def _settle(self, delivery: _Delivery, uid: int, outcome: Answer | Refusal) -> None:
        """Handles the broker's answer to one notice for one uid."""
        self._in_flight -= 1
        if outcome is LOST:
            self._sends.appendleft((delivery, uid))
            return
        why = "" if isinstance(outcome, Answer) else outcome.reason
        if not why:
            self.counts["delivered"] += 1
        elif why not in ("no-daemon", "daemon-full"):
            self._log("quota-notice-refused", uid=uid, why=why)
            why = ""  # not retried: the refusal is permanent
        self._on_outcome(delivery, uid, why)
        self._send()
        self.link.changed()

    def _on_outcome(self, delivery: _Delivery, uid: int, why: str) -> None:
        delivery.outcomes[uid] = why
        delivery.left -= 1
        if delivery.left:
            return
        item, outcomes = delivery.item, delivery.outcomes
        without = [one for one in item.to if outcomes[one] == "no-daemon"]
        copy = self._setup.rules.copy_to_system and item.notice.subject.kind == USER and not item.again
        if (without or copy) and not delivery.system:
            delivery.system, delivery.left = True, 1
            self._sends.appendleft((delivery, SYSTEM))
            return
        del self._deliveries[item.number]
        delivered = {one for one, reason in outcomes.items() if not reason}
        missed = [one for one in item.to if one not in delivered and not (one in without and SYSTEM in delivered)]
        full = any(one not in without for one in missed) or outcomes.get(SYSTEM) == "daemon-full"
        self._answer(Delivered(item.number, tuple(missed), full))
        # A daemon may have registered after the broker answered "no-daemon" and before this: deliver to it now.
        none = {uid for uid, reason in outcomes.items() if reason == "no-daemon"}
        if missed and none & self.link.registered:
            self.on_registered(none & self.link.registered)

    # --- called by the link to the broker --------------------------------------------------------------------

    def on_connected(self) -> None:
        self._send()

    def on_registered(self, uids: Collection[int]) -> None:
        for uid in uids if self._thread.is_alive() else ():
            self.clerk.inbox.put(Arrived(uid))

    def on_refused(self, reason: str) -> None:
        self.superfluous = self.superfluous or reason == "duplicate"

    # --- shutdown and status ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Delivers pending notices and saves the others. Does neither if the broker has another quota source."""
        if self._listener is not None and not self.superfluous:
            with contextlib.suppress(OSError):
                self._folding.add(self._listener.receive(_AT_ONCE, quota.MAX_MESSAGE))
            self.clerk.inbox.put(Warnings(self._folding.take()))
        self._closing.set()
        self.clerk.inbox.put(Stop())
        self._thread.join(_LAST_WORDS)
        if self._thread.is_alive():
            self._log("quota-worker-blocked", why="a system call or name look-up has not returned")
        else:
            self._settle_all()
            if self._listener is not None and not self.superfluous:
                self.clerk.save()
        if self._listener is not None:
            self._loop.remove(self._listener)
            self._listener.close()
        self.link.close()
        self._loop.remove(self._reader)
        self._reader.close()
        self._writer.close()

    def _settle_all(self) -> None:
        """Handles what the worker left in both queues; called after its thread has ended."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self.clerk.inbox.get_nowait()
                if isinstance(item, Delivered):
                    self.clerk.on_delivered(item)
        while self._outbox:
            posted = self._outbox.popleft()
            if isinstance(posted, Deliver):
                self._deliver(posted)
            elif isinstance(posted, _Opened) and posted.listener is not None:
                posted.listener.close()
        self._send()
        end = time.monotonic() + _LAST_WORDS
        while self._deliveries and self.link.lives and time.monotonic() < end:
            self._loop.turn(end)

    def status(self) -> dict[str, object]:
        """Returns the source's part of `upcall status`. Counts since the process's start; `undelivered`: waiting
        notices; `readings`: how often all quotas were read."""
        folding, listener = self._folding, self._listener
        points = sorted(mount.point for mount in tuple(self.clerk.filesystems.values()))
        while len(json.dumps(points)) > _MOUNTS:
            points = points[: len(points) // 2]
        return {
            "pid": os.getpid(),
            "hardening": self.hardening,
            "listening": listener is not None,
            "why": self.why,
            "received": folding.received,
            "folded": folding.folded,
            "dropped": folding.dropped,
            "lost": folding.sequence.lost,
            "overflows": listener.overflows if listener else 0,
            "nonsense": folding.nonsense + self.clerk.unknown + (listener.foreign if listener else 0),
            "delivered": self.counts["delivered"],
            "undelivered": self.clerk.undelivered,
            "watched": len(self.clerk.core),
            "readings": self.clerk.readings,
            "filesystems": points,
        }
