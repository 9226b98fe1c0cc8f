"""What one sink has still to tell. Pure; times are seconds on any clock.

Of each quota only the newest state is worth telling: it takes the place of an older one that waits. A sink that
could not tell is left alone for a while, twice as long each time, and each notice is tried a few times only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final, NamedTuple

from upcall.protocols.quota.notice import DIGEST, TEST, QuotaNotice

MOST: Final = 64  # notices that wait
TRIES: Final = 10  # of one notice: with the pauses between them, a quarter of an hour
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0


class Item(NamedTuple):
    """A notice that waits, its text, and how often it was tried in vain."""

    notice: QuotaNotice
    text: str
    tries: int = 0


def key_of(notice: QuotaNotice) -> Hashable:
    """Whose quota of what, and where. A digest speaks for several, and a test for none."""
    apart = notice.event if notice.event in (DIGEST, TEST) else ""
    return (*notice.subject[:2], notice.filesystem.device, notice.resource, apart)


class Waiting:
    """A sink's queue. `replaced` counts what something newer took the place of, `dropped` what had no room."""

    def __init__(self) -> None:
        self._items: dict[Hashable, Item] = {}
        self._failures = 0  # in a row
        self._not_before = -math.inf
        self.replaced = self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, notice: QuotaNotice, text: str) -> None:
        """In the place of what is older, or at the end. What has waited longest goes if there is no room."""
        key = key_of(notice)
        if key in self._items:
            self.replaced += 1
        elif len(self._items) >= MOST:
            del self._items[next(iter(self._items))]
            self.dropped += 1
        self._items[key] = Item(notice, text)

    def take(self, now: float) -> Item | float:
        """What is to be told now; or how many seconds to wait, inf if nothing waits."""
        if not self._items:
            return math.inf
        if now < self._not_before:
            return self._not_before - now
        return self._items.pop(next(iter(self._items)))

    def told(self) -> None:
        """The sink works."""
        self._failures, self._not_before = 0, -math.inf

    def failed(self, item: Item, now: float, jitter: float) -> bool:
        """It may be tried again, after a pause that `jitter` (0 to 1) shortens by up to half. False: given up."""
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
