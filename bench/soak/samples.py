"""What a process holds, second by second, and whether it grows."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

WARM_UP = 0.2  # of the time: what is imported, cached and opened once, is there by then


class Sample(NamedTuple):
    """Of one process, `at` seconds after the beginning. Memory in MB; what may not be looked at is 0. `pss`: what it
    shares is counted in parts, so that it moves when others come and go. `private`: what nobody else has."""

    at: float
    who: str
    rss: float
    pss: float
    private: float
    descriptors: int
    threads: int


class Bound(NamedTuple):
    """How much of a figure may be added in a run and still count as flat."""

    figure: str
    unit: str
    most: float


# A page here and there is the allocator's; a leak of 1 byte for each of a million requests would be a megabyte.
_MEMORY = 1.0  # MB
BOUNDS = (
    Bound("rss", "MB", _MEMORY),
    Bound("private", "MB", _MEMORY),
    Bound("descriptors", "", 2.0),
    Bound("threads", "", 2.0),
)


class Growth(NamedTuple):
    """Of one figure of one process: what a straight line through it adds in the run after the warm-up."""

    who: str
    bound: Bound
    middle: float
    added: float
    per_hour: float

    @property
    def flat(self) -> bool:
        return self.added <= self.bound.most


def sample(at: float, who: str, pid: int) -> Sample:
    """OSError if it has ended."""
    found = _kb(Path(f"/proc/{pid}/status"))
    mapped = _kb(Path(f"/proc/{pid}/smaps_rollup"))
    private = mapped.get("Private_Clean", 0) + mapped.get("Private_Dirty", 0)
    rss, pss = found["VmRSS"], mapped.get("Pss", 0)
    return Sample(at, who, rss / 1024, pss / 1024, private / 1024, _descriptors(pid), found["Threads"])


def _kb(path: Path) -> dict[str, int]:
    """The lines "Name: NUMBER ..."; none if it is not ours to look at."""
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except PermissionError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in fields if rest.split() and rest.split()[0].isdigit()}


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except PermissionError:
        return 0


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Each process's, in the order in which they came."""
    found = []
    last = max(one.at for one in samples)
    for who in dict.fromkeys(one.who for one in samples):
        warm = [one for one in samples if one.who == who and one.at >= last * WARM_UP]
        for bound in BOUNDS:
            values = [float(getattr(one, bound.figure)) for one in warm]
            slope = _slope([one.at for one in warm], values)
            middle = sorted(values)[len(values) // 2]
            found.append(Growth(who, bound, middle, slope * (warm[-1].at - warm[0].at), slope * 3600))
    return found


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line with the least squares."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((one - x) ** 2 for one in xs)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0.0


def write(path: Path, samples: Iterable[Sample]) -> None:
    with path.open("w", encoding="ascii", newline="") as file:
        table = csv.writer(file)
        table.writerow(Sample._fields)
        table.writerows((f"{one.at:.1f}", one.who, *(f"{mb:.2f}" for mb in one[2:5]), *one[5:]) for one in samples)
