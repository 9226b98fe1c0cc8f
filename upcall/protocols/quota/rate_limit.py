"""Limits the rate of notifications per uid; further ones are merged into a digest. Pure; times are unix seconds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from upcall.protocols.quota.notice import DIGEST
from upcall.protocols.quota.policy import Told
from upcall.protocols.quota.settings import Rules


class _Person:
    __slots__ = ("count", "latest", "times")

    def __init__(self, most: int) -> None:
        self.times: deque[float] = deque(maxlen=most)  # when the last notifications were sent
        self.count = 0  # of delayed notifications
        self.latest: Told | None = None


class Digests:
    """By uid: the times of recent notifications, and what is delayed."""

    def __init__(self, rules: Rules) -> None:
        self._after, self._within = rules.digest_after, rules.digest_within
        self._people: dict[int, _Person] = {}
        self._wake = math.inf

    def pass_on(self, told: Told, now: float) -> Told | None:
        """Returns the notification for the recipients below their limit; None if all of it is delayed."""
        allowed = tuple(uid for uid in told.to if self._allowed(uid, told, now))
        return told._replace(to=allowed) if allowed else None

    def _allowed(self, uid: int, told: Told, now: float) -> bool:
        person = self._people.get(uid)
        if person is None:
            person = self._people[uid] = _Person(self._after)
        if person.latest is None and self._free_at(person) <= now:
            person.times.append(now)
            self._wake = min(self._wake, now + self._within)
            return True
        person.count += 1
        person.latest = told
        self._wake = min(self._wake, self._free_at(person))
        return False

    def _free_at(self, person: _Person) -> float:
        return person.times[0] + self._within if len(person.times) == self._after else -math.inf

    def next_wake(self) -> float:
        """Returns the unix time at which `due` has something; inf if never."""
        return self._wake

    def due(self, now: float) -> Iterable[Told]:
        """Yields the digests that are due: the latest delayed notification of each uid, with the number of merged
        ones."""
        if now < self._wake:
            return
        self._wake = math.inf
        for uid, person in tuple(self._people.items()):
            if person.latest is not None and self._free_at(person) <= now:
                told = person.latest._replace(to=(uid,), event=DIGEST, count=person.count)
                person.latest, person.count = None, 0
                person.times.append(now)
                yield told
            if person.latest is not None:
                self._wake = min(self._wake, self._free_at(person))
            elif person.times[-1] + self._within <= now:
                del self._people[uid]
            else:
                self._wake = min(self._wake, person.times[-1] + self._within)
