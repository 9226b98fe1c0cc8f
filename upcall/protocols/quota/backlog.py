"""Notices that reached nobody yet: of each quota the latest, until its person's daemon comes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from upcall.protocols.quota.notice import QuotaNotice

PER_PERSON: Final = 64
IN_ALL: Final = 8192


class Kept:
    """By uid; the oldest are given up when there are too many."""

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
        """Instead of an older one about the same quota, whose warnings it takes over."""
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
        """What waits for this person, the oldest first; it is not kept any more."""
        mine = self._by_uid.pop(uid, {})
        self._count -= len(mine)
        return list(mine.values())

    def people(self) -> list[int]:
        """Who has something waiting."""
        return list(self._by_uid)
