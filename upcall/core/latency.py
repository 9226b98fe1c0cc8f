"""Counts request latencies in a fixed histogram. Pure."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

# Upper ends of the buckets, in seconds; longer ones are counted in an extra bucket. Key modules in the daemon answer
# within the first three, tokens in the next, people and file servers in the rest. The longest patience is 10 s.
BOUNDS: Final = (0.0001, 0.00025, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0)


class Latencies:
    """A histogram of durations in seconds: `counts` per bucket of BOUNDS plus one, and their sum."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0  # sum of all durations

    def add(self, seconds: float) -> None:
        """Counts one duration in seconds."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """The number of durations counted."""
        return sum(self.counts)

    def status(self) -> dict[str, object]:
        """Returns plain data for JSON. `counts` are per bucket, not cumulative; the last has no upper end."""
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "seconds": round(self.seconds, 6)}
