"""Keeps undelivered notices, the latest of each quota, until the daemon of their uid registers. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from upcall.protocols.quota.notice import QuotaNotice

PER_PERSON: Final = 64  # notices of one uid
IN_ALL: Final = 8192


class Kept:
    """Undelivered notices by uid. At a limit the oldest are discarded and counted in `given_up`. Not thread-safe."""

    def __init__(self) -> None:
        self._by_uid: dict[int, dict[tuple[object, ...], QuotaNotice]] = {}
        self._count = 0
        self.given_up = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, QuotaNotice]]:
        for uid, notices in self._by_uid.items():
            for notice in notices.values():
                yield uid, notice

    def put(self, uid: int, notice: QuotaNotice) -> None:
        """Adds a notice for `uid`. It replaces an older one about the same quota and adds that one's counts to its
        own."""
        mine = self._by_uid.setdefault(uid, {})
        subject = notice.subject
        key = subject.kind, subject.id, notice.filesystem.device, notice.filesystem.mount, notice.resource
        before = mine.pop(key, None)
        if before is not None:
            if before.at > notice.at:
                notice, before = before, notice
            notice = notice._replace(count=notice.count + before.count, lost=notice.lost + before.lost)
            self._count -= 1
        elif len(mine) >= PER_PERSON:
            self._give_up(uid)
        elif self._count >= IN_ALL:
            self._give_up(max(self._by_uid, key=lambda one: len(self._by_uid[one])))
        self._by_uid.setdefault(uid, mine)[key] = notice
        self._count += 1

    def _give_up(self, uid: int) -> None:
        mine = self._by_uid[uid]
        del mine[next(iter(mine))]
        self._count -= 1
        self.given_up += 1
        if not mine:
            del self._by_uid[uid]

    def take(self, uid: int) -> list[QuotaNotice]:
        """Removes and returns the notices for `uid`, oldest first; an empty list if there are none."""
        mine = self._by_uid.pop(uid, {})
        self._count -= len(mine)
        return list(mine.values())

    def people(self) -> list[int]:
        """Returns the uids that have notices."""
        return list(self._by_uid)
