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

T = TypeVar("T")


class Effort(NamedTuple):
    """The amount of work of a run: the number of rounds, and the size of one."""

    rounds: int
    messages: int  # of a round trip, one after the other
    seconds: float  # of a throughput


FULL = Effort(7, 3000, 1.0)
QUICK = Effort(3, 600, 0.25)


class Row(NamedTuple):
    """One comparison. `ratio`: ours / peer, the median of the ratios of all rounds. `goal`: for people."""

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
    return Row(group, name, unit, statistics.median(ours), statistics.median(peer), peer_is, ratio, goal, met, note)


def bounded(
    group: str, name: str, unit: str, ours: float, at_most: float, peer: float | None = None, peer_is: str = ""
) -> Row:
    """Returns a row whose goal is a limit for our own figure."""
    ratio = None if peer is None else ours / peer
    return Row(group, name, unit, ours, peer, peer_is, ratio, f"<= {at_most:g} {unit}", ours <= at_most)


def by_turns(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Runs each contender once per round; in every other round in reverse order, so that none always follows the same
    one."""
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(contenders[name]())
    return found


def machine() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "uid": os.geteuid(),
        "load": os.getloadavg()[0],
    }


def write_json(path: Path, rows: Iterable[Row]) -> None:
    found = {"machine": machine(), "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


# --- for people ----------------------------------------------------------------------------------------------

_HEADS = ("", "ours", "peer", "", "ratio", "goal", "")


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return (
        row.name, _figure(row.ours, row.unit), _figure(row.peer, row.unit), row.peer_is, ratio, row.goal, verdict
    )  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Prints one table per group: drawn on a terminal, in plain columns elsewhere."""
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        if sys.stdout.isatty():
            _draw(group, mine)
        else:
            _print(group, mine)
        for note in dict.fromkeys(row.note for row in mine if row.note):
            print(f"  ({note})")
    sys.stdout.flush()


def _draw(group: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=group, title_justify="left", title_style="bold")
    for number, head in enumerate(_HEADS):
        table.add_column(head, justify="right" if number in (1, 2, 4) else "left")
    for row in rows:
        *cells, verdict = _cells(row)
        style = {True: "green", False: "red", None: ""}[row.met]
        table.add_row(*cells, f"[{style}]{verdict}[/{style}]" if style else verdict)
    Console().print(table)


def _print(group: str, rows: Sequence[Row]) -> None:
    lines = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    print(f"\n{group}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
