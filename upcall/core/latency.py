"""How long requests took, in a few buckets: enough for a graph, cheap enough for each request. Pure."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

# Seconds, each the upper end of a bucket; what took longer is in the last one. A key module in the daemon answers in
# the first three, a token in the next, people and file servers in the rest; the longest patience is 10 s.
BOUNDS: Final = (0.0001, 0.00025, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0)


class Latencies:
    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0  # all together

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def status(self) -> dict[str, object]:
        """`counts`: of each bucket alone; the last has no upper end."""
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "seconds": round(self.seconds, 6)}
