"""Samples resources of processes every second, and detects growth."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

WARM_UP = 0.2  # of the time, ignored: imports, caches, first openings


class Sample(NamedTuple):
    """One process's resources, `at` seconds after the start. Memory in MB; 0 if it may not be read. `pss`: shared
    memory is divided by the number of sharing processes, so it varies with them. `private`: memory of this process
    alone."""

    at: float
    who: str
    rss: float
    pss: float
    private: float
    descriptors: int
    threads: int


class Bound(NamedTuple):
    """The growth of a figure during a run that still counts as flat."""

    figure: str
    unit: str
    most: float


# Allows for single pages of the allocator; a leak of 1 byte per request would be a megabyte for a million requests.
_MEMORY = 1.0  # MB
BOUNDS = (
    Bound("rss", "MB", _MEMORY),
    Bound("private", "MB", _MEMORY),
    Bound("descriptors", "", 2.0),
    Bound("threads", "", 2.0),
)


class Growth(NamedTuple):
    """The growth of one figure of one process during the run after the warm-up, by linear regression."""

    who: str
    bound: Bound
    middle: float
    added: float
    per_hour: float

    @property
    def flat(self) -> bool:
        return self.added <= self.bound.most


def sample(at: float, who: str, pid: int) -> Sample:
    """Samples a process. OSError if it has ended."""
    found = _kb(Path(f"/proc/{pid}/status"))
    mapped = _kb(Path(f"/proc/{pid}/smaps_rollup"))
    private = mapped.get("Private_Clean", 0) + mapped.get("Private_Dirty", 0)
    rss, pss = found["VmRSS"], mapped.get("Pss", 0)
    return Sample(at, who, rss / 1024, pss / 1024, private / 1024, _descriptors(pid), found["Threads"])


def _kb(path: Path) -> dict[str, int]:
    """Returns the values of lines "Name: NUMBER ..."; {} if the file may not be read."""
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
    """Returns the growth of all figures, by process in the order of appearance."""
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
    """Returns the slope of the least squares line."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((one - x) ** 2 for one in xs)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0.0


def write(path: Path, samples: Iterable[Sample]) -> None:
    with path.open("w", encoding="ascii", newline="") as file:
        table = csv.writer(file)
        table.writerow(Sample._fields)
        table.writerows((f"{one.at:.1f}", one.who, *(f"{mb:.2f}" for mb in one[2:5]), *one[5:]) for one in samples)
