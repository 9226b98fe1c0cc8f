"""The worker: a thread that turns coalesced warnings into notices. It owns the state, the figures and the names.

It may block on a disk or a directory service; the loop never does. It receives items through `inbox` and sends items
to the loop by calling `post`.
"""

from __future__ import annotations

import math
import os
import queue
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.kernel.mounts import Mount
from upcall.protocols.quota import state as memory
from upcall.protocols.quota.backlog import Kept
from upcall.protocols.quota.notice import FILES, KINDS, OVER_SOFT, SPACE, Cause, Filesystem, QuotaNotice, Raw, Subject
from upcall.protocols.quota.policy import SYSTEM, Core, Key, Told
from upcall.protocols.quota.rate_limit import Digests
from upcall.protocols.quota.scan import Walk
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.system import World, read_state, write_state
from upcall.protocols.quota.warning import MEANING, Figures, take_attributes

_PER_TURN: Final = 64  # quotas that are read before the inbox is served again
_PAUSE: Final = 0.005  # seconds between two such turns
_SAVE_AFTER: Final = 5.0  # seconds from a change to writing the state
_TRY_AGAIN: Final = 5.0  # seconds until delivery to a daemon with a full socket buffer is retried
_LOOK_AGAIN: Final = 2.0  # seconds between two searches for unknown filesystems


class Warnings(NamedTuple):
    """To the worker: received warnings (attributes) and how often each came."""

    table: dict[bytes, int]


class Lost(NamedTuple):
    """To the worker: the number of messages lost since the previous item of this type."""

    count: int  # type: ignore[assignment]  # not tuple.count


class Arrived(NamedTuple):
    """To the worker: a daemon has registered."""

    uid: int


class Deliver(NamedTuple):
    """To the loop: deliver a notice to these uids. `again`: a repeated delivery. Answered by Delivered."""

    number: int
    notice: QuotaNotice
    to: tuple[int, ...]
    again: bool = False


class Delivered(NamedTuple):
    """To the worker: the outcome of a Deliver. `missed`: uids that were not reached; `full`: because a socket buffer
    was full, otherwise because no daemon is registered."""

    number: int
    missed: tuple[int, ...] = ()
    full: bool = False


class Seen(NamedTuple):
    """To the loop: the worker's part of the status has changed."""


class Done(NamedTuple):
    """To the loop: the worker has processed the Warnings."""


class Stop(NamedTuple):
    """To the worker: end the thread."""


class Clerk:
    """The quota worker. `run` is the thread's body. Another thread may read the public attributes, for a status."""

    def __init__(
        self,
        rules: Rules,
        world: World,
        state: Path,
        post: Callable[[Deliver | Done | Seen], None],
        log: Callable[..., None],
    ) -> None:
        self.inbox: queue.SimpleQueue[Warnings | Lost | Arrived | Delivered | Stop] = queue.SimpleQueue()
        self.core = Core(rules)
        self.kept = Kept()  # notices for uids without a daemon
        self.full = Kept()  # notices for daemons with a full socket buffer
        self.handed: dict[int, Deliver] = {}  # given to the loop, not yet answered
        self.filesystems: dict[int, Mount] = {}  # by device number
        self.unknown = 0  # malformed warnings
        self._rules, self._world, self._state, self._post, self._log = rules, world, state, post, log
        self._digests = Digests(rules)
        self._walk: Walk[Mount] = Walk(rules.interval)
        self._looked = -math.inf
        self._lost = self._number = 0
        self._shown: tuple[object, ...] = ()
        self._again_at = math.inf
        self._save_at = math.inf

    @property
    def readings(self) -> int:
        """How often all quotas were read and the resulting notices made."""
        return self._walk.ended

    @property
    def undelivered(self) -> int:
        """The number of notices not yet delivered."""
        return len(self.kept) + len(self.full) + len(self.handed)

    def run(self) -> None:
        """Processes the inbox until Stop."""
        self._find_filesystems()
        self._load()
        while True:
            self._show()
            try:
                item = self.inbox.get(timeout=self._patience())
            except queue.Empty:
                item = None
            if isinstance(item, Stop):
                return
            try:
                self._take(item)
                self._turn()
            except Exception as error:  # noqa: BLE001 - the next warning must still be processed
                self._log("quota-worker-error", why=f"{type(error).__name__}: {error}")

    def _show(self) -> None:
        shown = self.undelivered, len(self.core), self.readings, self.unknown, tuple(self.filesystems)
        if shown != self._shown:
            self._shown = shown
            self._post(Seen())

    def _patience(self) -> float:
        wall, now = time.time(), time.monotonic()
        if self._walk.going:
            return _PAUSE
        wakes = [self.core.next_wake() - wall, self._digests.next_wake() - wall]
        wakes += [at - now for at in (self._walk.at, self._again_at, self._save_at)]
        return min(max(_PAUSE, min(wakes)), 3600.0)

    def _take(self, item: Warnings | Lost | Arrived | Delivered | None) -> None:
        if isinstance(item, Warnings):
            try:
                self._on_warnings(item.table)
            finally:
                self._post(Done())
        elif isinstance(item, Lost):
            self._lost += item.count
            self._walk.soon(time.monotonic())  # compensates the lost messages
        elif isinstance(item, Arrived):
            self._on_arrival(item.uid)
        elif isinstance(item, Delivered):
            self.on_delivered(item)

    def _turn(self) -> None:
        """Does a bounded part of what is due."""
        wall, now = time.time(), time.monotonic()
        for key in tuple(self.core.due(wall, _PER_TURN)):
            figures = self._figures(key)
            if figures is None:
                self.core.later(key, wall)
            else:
                self._tell(self.core.seen(key, figures, wall), wall)
        for told in tuple(self._digests.due(wall)):
            self._send(told, wall)
        if now >= self._again_at:
            self._again_at = math.inf
            self._send_again(self.full, self.full.people())
        self._step(wall, now)
        if now >= self._save_at:
            self.save()

    # --- warnings of the kernel ------------------------------------------------------------------------------

    def _on_warnings(self, table: dict[bytes, int]) -> None:
        for data, count in table.items():
            try:
                warned = take_attributes(data)
                device = os.makedev(warned.major, warned.minor)
            except (PeerError, OverflowError):
                self.unknown += count
                continue
            if warned.qtype >= len(KINDS) or max(warned.excess_id, warned.caused_id) > 0xFFFFFFFF:
                self.unknown += count
                continue
            key = Key(device, warned.qtype, warned.excess_id, MEANING.get(warned.warning, (SPACE, ""))[0])
            wall = time.time()
            self._tell(self.core.warned(key, warned, count, self._figures(key), wall), wall)

    def _figures(self, key: Key) -> Figures | None:
        mount = self._mount(key.device)
        if mount is None:
            return None
        try:
            return self._world.get(mount, key.kind, key.id).of(key.resource)
        except OSError as error:
            self._log("quota-read-failed", mount=mount.point, why=error)
            self._look_again()
            return None

    # --- filesystems -----------------------------------------------------------------------------------------

    def _mount(self, device: int) -> Mount | None:
        if device not in self.filesystems:
            if self._world.changed():
                self._find_filesystems()
            else:
                self._look_again()
        return self.filesystems.get(device)

    def _look_again(self) -> None:
        if time.monotonic() - self._looked > _LOOK_AGAIN:
            self._find_filesystems()

    def _find_filesystems(self) -> None:
        try:
            found = self._world.filesystems()
        except OSError as error:
            self._log("quota-mounts-read-failed", why=error)
            found = {}
        self._looked = time.monotonic()
        self.filesystems = {mount.device: mount for mount in found}
        self._walk.over = [(mount, kind) for mount, kinds in found.items() for kind in kinds]

    def _step(self, wall: float, now: float) -> None:
        """Does one step of the periodic reading of all quotas."""
        if self._walk.begins(now):
            self._find_filesystems()
        at = self._walk.where()
        if at is None:
            return
        mount, kind, first = at
        try:
            quotas, following = self._world.some(mount, kind, first, _PER_TURN)
        except OSError as error:
            self._log("quota-read-failed", mount=mount.point, why=error)
            quotas, following = [], -1
        try:
            for quota in quotas:
                for resource in (SPACE, FILES) if quota.id and quota.limited else ():  # which has no limits
                    key = Key(mount.device, kind, quota.id, resource)
                    self._tell(self.core.seen(key, quota.of(resource), wall), wall)
        finally:
            self._walk.went_to(following)

    # --- notices ---------------------------------------------------------------------------------------------

    def _tell(self, news: Iterable[Told], wall: float) -> None:
        for told in news:
            allowed = self._digests.pass_on(told, wall)
            if allowed is not None:
                self._send(allowed, wall)
            self._changed()

    def _send(self, told: Told, wall: float) -> None:
        self._hand_over(self._notice(told, wall), told.to)

    def _hand_over(self, notice: QuotaNotice, to: tuple[int, ...], again: bool = False) -> None:
        self._number += 1
        item = self.handed[self._number] = Deliver(self._number, notice, to, again)
        self._post(item)

    def _notice(self, told: Told, wall: float) -> QuotaNotice:
        key, figures = told.key, told.figures
        mount = self.filesystems.get(key.device)
        numbers = os.major(key.device), os.minor(key.device)
        limit = figures.soft or figures.hard
        lost, self._lost = self._lost, 0
        return QuotaNotice(
            event=told.event,
            resource=key.resource,
            subject=Subject(KINDS[key.kind], key.id, self._world.name(key.kind, key.id)),
            cause=Cause() if told.cause is None else Cause(told.cause, self._world.name(0, told.cause)),
            filesystem=Filesystem(mount.point, mount.source, mount.type)
            if mount
            else Filesystem(None, "{}:{}".format(*numbers), ""),
            used=figures.used,
            soft=figures.soft,
            hard=figures.hard,
            grace_until=figures.grace_until or self._grace(told, wall),
            percent=figures.used * 100 // limit if limit else None,
            at=max(0, int(wall)),
            count=told.count,
            lost=lost,
            raw=None if told.warning is None else Raw(key.kind, told.warning, *numbers),
        )

    def _grace(self, told: Told, wall: float) -> int | None:
        """Computes the end of a grace period that the kernel has not set yet: XFS warns before it writes, and sets the
        date up to half a minute later, when it has written."""
        key, mount = told.key, self.filesystems.get(told.key.device)
        if told.event != OVER_SOFT or mount is None:
            return None
        try:
            period = self._world.grace(mount, key.kind, key.resource)
        except OSError as error:
            self._log("quota-read-failed", mount=mount.point, why=error)
            return None
        return int(wall) + period if period else None

    def on_delivered(self, item: Delivered) -> None:
        """Records the outcome of a delivery. Called in the worker's thread, or after that has ended."""
        handed = self.handed.pop(item.number)
        if item.missed and item.full:
            self._again_at = min(self._again_at, time.monotonic() + _TRY_AGAIN)
        for uid in item.missed:
            (self.full if item.full else self.kept).put(uid, handed.notice)
        self._changed()

    def _on_arrival(self, uid: int) -> None:
        """Delivers what waits for this uid; everything if it is the machine's daemon that has registered."""
        self._send_again(self.kept, self.kept.people() if uid == SYSTEM else [uid])

    def _send_again(self, kept: Kept, people: Iterable[int]) -> None:
        for uid in people:
            for notice in kept.take(uid):
                self._hand_over(notice, (uid,), again=True)
                self._changed()

    # --- the state across a restart --------------------------------------------------------------------------

    def _changed(self) -> None:
        self._save_at = min(self._save_at, time.monotonic() + _SAVE_AFTER)

    def save(self) -> None:
        """Writes the state. Called in the worker's thread, or after that has ended."""
        self._save_at = math.inf
        points = {device: mount.point for device, mount in self.filesystems.items()}
        handed = ((uid, item.notice) for item in self.handed.values() for uid in item.to)
        try:
            write_state(self._state, memory.dump(self.core, (*self.kept, *self.full, *handed), points))
        except OSError as error:
            self._log("quota-state-write-failed", file=self._state, why=error)

    def _load(self) -> None:
        devices = {mount.point: mount.device for mount in self.filesystems.values()}
        try:
            data = read_state(self._state)
            damaged = memory.load(data, self.core, self.kept, devices, time.time()) if data is not None else 0
        except (OSError, PeerError) as error:
            self._log("quota-state-read-failed", file=self._state, why=error)
            return
        if damaged:
            self._log("quota-state-damaged", file=self._state, entries=damaged)
