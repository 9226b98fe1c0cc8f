"""Implements the queue of one sink, with exponential back-off. Pure; times are seconds on any clock.

A new notice replaces a waiting one of the same quota: only the newest state matters. After a failure the sink pauses,
twice as long each time. The attempts for each notice are limited.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final, NamedTuple

from upcall.protocols.quota.notice import DIGEST, TEST, QuotaNotice

MOST: Final = 64  # limit of waiting notices
TRIES: Final = 10  # attempts for one notice; with the pauses, a quarter of an hour
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0


class Item(NamedTuple):
    """A waiting notice, its text for people, and the number of failed attempts."""

    notice: QuotaNotice
    text: str
    tries: int = 0


def key_of(notice: QuotaNotice) -> Hashable:
    """Returns the identity of a notice's quota: subject, resource and file system. Digests and tests have their
    own."""
    apart = notice.event if notice.event in (DIGEST, TEST) else ""
    return (*notice.subject[:2], notice.filesystem.device, notice.resource, apart)


class Waiting:
    """A sink's queue. `replaced`: number of notices replaced by newer ones. `dropped`: number dropped for lack of
    room. Not thread-safe."""

    def __init__(self) -> None:
        self._items: dict[Hashable, Item] = {}
        self._failures = 0  # in a row
        self._not_before = -math.inf
        self.replaced = self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, notice: QuotaNotice, text: str) -> None:
        """Queues a notice: in place of an older one of the same quota, otherwise at the end. Drops the oldest one if
        the queue is full."""
        key = key_of(notice)
        if key in self._items:
            self.replaced += 1
        elif len(self._items) >= MOST:
            del self._items[next(iter(self._items))]
            self.dropped += 1
        self._items[key] = Item(notice, text)

    def take(self, now: float) -> Item | float:
        """Returns the next notice if it is due; otherwise the seconds to wait, inf if the queue is empty."""
        if not self._items:
            return math.inf
        if now < self._not_before:
            return self._not_before - now
        return self._items.pop(next(iter(self._items)))

    def told(self) -> None:
        """Resets the back-off after a success."""
        self._failures, self._not_before = 0, -math.inf

    def failed(self, item: Item, now: float, jitter: float) -> bool:
        """Starts the back-off after a failure, and queues the notice again. `jitter`: 0 to 1, shortens the pause by up
        to half. False if the notice is dropped: after TRIES attempts, or if the queue is full."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures, 30))
        self._failures += 1
        self._not_before = now + pause * (1 - jitter / 2)
        item = item._replace(tries=item.tries + 1)
        if item.tries >= TRIES:
            return False
        key = key_of(item.notice)
        if key in self._items:
            self.replaced += 1
        elif len(self._items) >= MOST:
            self.dropped += 1
            return False
        else:
            self._items[key] = item
        return True
