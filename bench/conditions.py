"""Tells under which conditions figures were measured: interpreter, processors, load of others, drift of their speed.

A sample during which other processes used the processors is taken again. There is no verdict on a goal if too many
samples were disturbed all the same, or if the peer's own figures vary.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from bench.stage import cpu_us

T = TypeVar("T")
U = TypeVar("U")

MOST_SPREAD: Final = 0.10  # of a peer's own figures, for a verdict
MOST_FOREIGN: Final = 0.05  # share of all processors that others may use during a sample
MOST_DISTURBED: Final = 0.25  # share of the samples, for a verdict
_TRIES: Final = 4  # of one sample
_LOOK: Final = 0.1  # seconds
_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")  # the resolution of /proc/stat
_PROCESSORS: Final = os.cpu_count() or 1


# --- other processes -----------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """Seconds since some moment: of the clock; in which the processors were idle, summed over them; of processor time
    of this process and its descendants."""

    at: float
    idle: float
    ours: float


def usage() -> Usage:
    lines = Path("/proc/stat").read_text("ascii").splitlines()
    _, _, _, _, idle, iowait, *_ = lines[0].split()
    return Usage(time.monotonic(), (int(idle) + int(iowait)) * _TICK, sum(_seconds(pid) for pid in _family()))


def _family() -> set[int]:
    """Returns the pids of this process and its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(_stat(folder).split()[1])
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new}
    return found


def _seconds(pid: int) -> float:
    """Returns the processor time of a process and of its children that have ended; 0 if it has ended itself."""
    try:
        ended = sum(int(ticks) for ticks in _stat(Path(f"/proc/{pid}")).split()[13:15])
        return cpu_us(pid) / 1e6 + ended * _TICK
    except OSError:
        return 0.0


def _stat(folder: Path) -> str:
    """Returns the fields of /proc/PID/stat behind the name, which may have blanks: state, ppid, ..."""
    return (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2]


def foreign_share(before: Usage, after: Usage, processors: int = _PROCESSORS) -> float:
    """Returns the share of all processors that others used. Two ticks are theirs by the clock's resolution only."""
    whole = (after.at - before.at) * processors
    busy = whole - (after.idle - before.idle)
    theirs = busy - (after.ours - before.ours) - 2 * _TICK
    return min(1.0, max(0.0, theirs / whole)) if whole > 0 else 0.0


class Series(list[T]):
    """Samples, and for each the share of the processors that others used meanwhile."""

    def __init__(self, samples: Iterable[T] = (), shares: Iterable[float] = ()) -> None:
        super().__init__(samples)
        self.shares = list(shares)

    def take(self, sample: T, share: float) -> None:
        self.append(sample)
        self.shares.append(share)

    def map(self, figure: Callable[[T], U]) -> Series[U]:
        return Series(map(figure, self), self.shares)


class Watch:
    """Takes samples; those during which others used the processors again. `left`: seconds that it may still spend on
    that, and on waiting until others are calm."""

    def __init__(
        self,
        patience: float = 0.0,
        usage: Callable[[], Usage] = usage,
        sleep: Callable[[float], None] = time.sleep,
        processors: int = _PROCESSORS,
    ) -> None:
        self.left = patience  # seconds
        self._usage, self._sleep, self._processors = usage, sleep, processors
        self.samples = self.retaken = self.disturbed = 0

    def take(self, measure: Callable[[], T]) -> tuple[T, float]:
        """Returns the calmest of at most four samples, and the share of the processors that others used meanwhile."""
        self.samples += 1
        best, share = self._once(measure)
        for _ in range(_TRIES - 1):
            if share <= MOST_FOREIGN or not self._calm():
                break
            self.retaken += 1
            start = self._usage().at
            again, others = self._once(measure)
            self.left -= self._usage().at - start
            if others < share:
                best, share = again, others
        self.disturbed += share > MOST_FOREIGN
        return best, share

    def _once(self, measure: Callable[[], T]) -> tuple[T, float]:
        before = self._usage()
        sample = measure()
        return sample, foreign_share(before, self._usage(), self._processors)

    def _calm(self) -> bool:
        """Waits until others leave the processors alone. False if the patience has run out."""
        while self.left > 0:
            _, share = self._once(lambda: self._sleep(_LOOK))
            self.left -= _LOOK
            if share <= MOST_FOREIGN:
                return True
        return False

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.retaken} taken again, {self.disturbed} disturbed by others all the same"


# --- verdicts ------------------------------------------------------------------------------------------------


def spread(figures: Sequence[float]) -> float | None:
    """Returns how far the middle half of the figures (with fewer than four: all) lies apart, relative to the median.
    None for a single figure, or a median of 0."""
    if len(figures) < 2 or not (middle := statistics.median(figures)):
        return None
    if len(figures) < 4:
        return (max(figures) - min(figures)) / abs(middle)
    low, _, high = statistics.quantiles(figures, n=4, method="inclusive")
    return (high - low) / abs(middle)


def doubt(ours: Sequence[float], peer: Sequence[float]) -> str:
    """Returns why a comparison gives no verdict; "" if it gives one."""
    apart = spread(peer)
    if apart is not None and apart > MOST_SPREAD:
        return f"the peer's own figures spread by {apart:.0%}"
    for samples in (ours, peer):
        shares = samples.shares if isinstance(samples, Series) else []
        disturbed = [share for share in shares if share > MOST_FOREIGN]
        if len(disturbed) > MOST_DISTURBED * len(shares):
            return f"others used up to {max(disturbed):.0%} of the processors"
    return ""


# --- the machine ---------------------------------------------------------------------------------------------


def interpreter() -> str:
    own = sysconfig.get_config_vars()
    system = Path(sys.base_prefix) == Path("/usr")
    return f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}, {built(own, system)}"


def built(variables: Mapping[str, object], system: bool) -> str:
    """Tells how an interpreter was built. `variables`: of sysconfig. `system`: whether it is a distribution's, whose
    build may ask make for the optimised interpreter, which the variables do not show."""
    arguments = str(variables.get("CONFIG_ARGS") or "")
    flags = " ".join(str(variables.get(name) or "") for name in ("PY_CFLAGS", "PY_CFLAGS_NODIST", "PY_LDFLAGS_NODIST"))
    level = "".join([word for word in flags.split() if word.startswith("-O")][-1:]) or "no -O"
    lto = " and LTO" if "--with-lto" in arguments or "-flto" in flags else ""
    if variables.get("Py_DEBUG"):
        return f"a debug build ({level})"
    if "--enable-optimizations" in arguments or "-fprofile-use" in flags:
        return f"optimised by a profile{lto} ({level})"
    if system:
        return f"the distribution's build{lto} ({level}; whether it is optimised by a profile, sysconfig does not say)"
    return f"NOT optimised by a profile{lto} ({level}; configured without --enable-optimizations: up to twice as slow)"


def processors() -> str:
    text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    lines = [line.partition(":")[::2] for line in text.splitlines()]
    fields = {name.strip(): value.strip() for name, value in lines}
    model = fields.get("model name") or platform.machine()
    virtual = ", of a virtual machine" if "hypervisor" in fields.get("flags", "").split() else ""
    return f"{_PROCESSORS} x {model}{virtual}"


def load() -> str:
    """Tells how much others run now, in the average minute, and before."""
    before = usage()
    time.sleep(5 * _LOOK)
    share = foreign_share(before, usage())
    averages = " ".join(f"{average:.2f}" for average in os.getloadavg())
    return f"others use {share:.0%} of the processors now; average load {averages}"


def drift(spreads: Iterable[float | None]) -> str:
    """Tells how much the speed of the processors varied, by the spreads of the peers' figures."""
    known = [one for one in spreads if one is not None]
    if not known:
        return "not known: no peer was measured several times"
    unsteady = sum(one > MOST_SPREAD for one in known)
    return (
        f"the peers' own figures spread by {statistics.median(known):.0%} (median of {len(known)} rows; "
        f"{unsteady} above {MOST_SPREAD:.0%})"
    )
