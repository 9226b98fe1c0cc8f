"""Defines rows, the results of benchmarks, and prints them for people and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.conditions import Series, Watch, doubt, drift, interpreter, processors, spread

T = TypeVar("T")


class Effort(NamedTuple):
    """The amount of work of a run: the number of rounds, and the size of one."""

    rounds: int
    messages: int  # of a round trip, one after the other
    seconds: float  # of a throughput
    patience: float  # seconds of the run for samples that others have disturbed


FULL = Effort(7, 3000, 1.0, 60.0)
QUICK = Effort(3, 600, 0.25, 3.0)


WATCH = Watch()  # of all rounds of this process


class Row(NamedTuple):
    """One comparison. `ratio`: ours / peer, the median of the ratios of all rounds. `goal`: for people. `spread`: of
    the peer's own figures, relative. `unsure`: why there is no verdict on the goal."""

    group: str
    name: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_is: str = ""
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""
    spread: float | None = None
    unsure: str = ""

    def judged(self, ours: Sequence[float], peer: Sequence[float]) -> Row:
        """Returns the row with the spread of these rounds, and without its verdict if they do not allow one."""
        why = doubt(ours, peer) if self.goal else ""
        return self._replace(spread=spread(peer), unsure=why, met=None if why else self.met)


def compared(
    group: str,
    name: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_is: str,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """Returns a row from rounds of two contenders that ran alternately, so that long disturbances affect both."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    goal, met = "", None
    if at_most is not None:
        goal, met = f"<= {at_most:g}x", ratio <= at_most
    elif at_least is not None:
        goal, met = f">= {at_least:g}x", ratio >= at_least
    row = Row(group, name, unit, statistics.median(ours), statistics.median(peer), peer_is, ratio, goal, met, note)
    return row.judged(ours, peer)


def bounded(
    group: str, name: str, unit: str, ours: float, at_most: float, peer: float | None = None, peer_is: str = ""
) -> Row:
    """Returns a row whose goal is a limit for our own figure."""
    ratio = None if peer is None else ours / peer
    return Row(group, name, unit, ours, peer, peer_is, ratio, f"<= {at_most:g} {unit}", ours <= at_most)


def by_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, watch: Watch | None = WATCH
) -> dict[str, Series[T]]:
    """Runs each contender once per round; in every other round in reverse order, so that none always follows the same
    one. `watch`: takes samples again that others disturb; None where it cannot know, in a guest."""
    found: dict[str, Series[T]] = {name: Series() for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            measure = contenders[name]
            found[name].take(*((measure(), 0.0) if watch is None else watch.take(measure)))
    return found


def machine() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "interpreter": interpreter(),
        "processor": processors(),
        "uid": os.geteuid(),
        "load": os.getloadavg()[0],
    }


def write_json(path: Path, rows: Iterable[Row]) -> None:
    rows = list(rows)
    conditions = {**machine(), "drift": drift(row.spread for row in rows)}
    found = {"machine": conditions, "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


# --- for people ----------------------------------------------------------------------------------------------

_HEADS = ("", "ours", "peer", "", "spread", "ratio", "goal", "")


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    verdict = f"unsure: {row.unsure}" if row.unsure else {True: "met", False: "NOT MET", None: ""}[row.met]
    apart = "" if row.spread is None else f"{row.spread:.0%}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    ours, peer = (_figure(figure, row.unit) for figure in (row.ours, row.peer))
    return row.name, ours, peer, row.peer_is, apart, ratio, row.goal, verdict


def show(rows: Sequence[Row]) -> None:
    """Prints one table per group: drawn on a terminal, in plain columns elsewhere."""
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        print(f"\n{group}\n  {drift(row.spread for row in mine)}")
        if sys.stdout.isatty():
            _draw(mine)
        else:
            _print(mine)
        for note in dict.fromkeys(row.note for row in mine if row.note):
            print(f"  ({note})")
    sys.stdout.flush()


def _draw(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, head in enumerate(_HEADS):
        table.add_column(head, justify="right" if number in (1, 2, 4, 5) else "left")
    for row in rows:
        *cells, verdict = _cells(row)
        style = {True: "green", False: "red", None: ""}[row.met]
        table.add_row(*cells, f"[{style}]{verdict}[/{style}]" if style else verdict)
    Console().print(table)


def _print(rows: Sequence[Row]) -> None:
    lines = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
