"""The periodic reading of all quotas: where it is, and when it begins again. Pure; times are seconds, monotonic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")  # what a filesystem is to the reader

_SOON: Final = 2.0  # seconds between a loss and the reading that makes up for it: losses come in crowds


class Walk(Generic[T]):
    """Over every filesystem and every kind of quota there, by ascending ids."""

    def __init__(self, interval: float) -> None:
        self.over: Sequence[tuple[T, int]] = ()
        self.at = 0.0  # when the next one begins
        self.ended = 0  # how many have
        self._interval = interval
        self._left: list[tuple[T, int]] | None = None
        self._first = 0

    @property
    def going(self) -> bool:
        return self._left is not None

    def soon(self, now: float) -> None:
        """Something was missed: begins soon."""
        self.at = min(self.at, now + _SOON)

    def begins(self, now: float) -> bool:
        """Whether one begins now; then `over` can still be changed."""
        if self.going or now < self.at:
            return False
        self._left, self._first = [], 0
        self.at = now + self._interval
        return True

    def where(self) -> tuple[T, int, int] | None:
        """What is to be read now: filesystem, kind of quota, the id to begin with. None: nothing."""
        if self._left == []:
            self._left = [*self.over]
            self._look_for_the_end()
        return None if self._left is None else (*self._left[0], self._first)

    def went_to(self, following: int) -> None:
        """The id that comes next; -1 after the last."""
        self._first = max(0, following)
        if following < 0 and self._left is not None:
            self._left = self._left[1:]
            self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if not self._left:
            self._left = None
            self.ended += 1
