"""Schedules the periodic reading of all quotas and keeps its position. Pure; times are seconds of CLOCK_MONOTONIC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")  # the caller's representation of a filesystem

_SOON: Final = 2.0  # seconds from a loss of messages to the reading that compensates it: losses come in bursts


class Walk(Generic[T]):
    """Iterates over every filesystem and every kind of quota in `over`, by ascending ids. `interval`: seconds."""

    def __init__(self, interval: float) -> None:
        self.over: Sequence[tuple[T, int]] = ()
        self.at = 0.0  # when the next reading begins
        self.ended = 0  # complete readings so far
        self._interval = interval
        self._left: list[tuple[T, int]] | None = None
        self._first = 0

    @property
    def going(self) -> bool:
        """Whether a reading is in progress."""
        return self._left is not None

    def soon(self, now: float) -> None:
        """Schedules a reading soon, because messages were lost."""
        self.at = min(self.at, now + _SOON)

    def begins(self, now: float) -> bool:
        """Returns whether a reading begins now; if so, `over` may be changed before `where` is called."""
        if self.going or now < self.at:
            return False
        self._left, self._first = [], 0
        self.at = now + self._interval
        return True

    def where(self) -> tuple[T, int, int] | None:
        """Returns what to read next: filesystem, kind of quota, first id. None if no reading is in progress."""
        if self._left == []:
            self._left = [*self.over]
            self._look_for_the_end()
        return None if self._left is None else (*self._left[0], self._first)

    def went_to(self, following: int) -> None:
        """Continues at the id `following`; -1: this kind of quota is complete."""
        self._first = max(0, following)
        if following < 0 and self._left is not None:
            self._left = self._left[1:]
            self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if not self._left:
            self._left = None
            self.ended += 1
