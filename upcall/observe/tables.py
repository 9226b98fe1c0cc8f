"""Lays tables out for a terminal: whole cells always, never folded."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

if TYPE_CHECKING:
    from rich.console import Console

_GAP: Final = "  "


def for_terminal(text: str) -> str:
    """Escapes control characters, so that text of others cannot inject escape sequences into a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Column(NamedTuple):
    """A column of a table. `optional`: it is left out, the last one first, where the terminal is too narrow."""

    head: str
    right: bool = False
    optional: bool = False


class Cell(NamedTuple):
    """A coloured cell. `style`: arguments of click.style."""

    text: str
    style: dict[str, Any] = {}


def table_lines(columns: Sequence[Column | str], rows: Sequence[Sequence[Cell | str]], width: int | None) -> list[str]:
    """Returns the lines of a table for a terminal of `width` columns; None if there is no terminal."""
    heads = [one if isinstance(one, Column) else Column(one) for one in columns]
    cells = [[_escaped(cell) for cell in row] for row in rows]
    shown = [*range(len(heads))]
    while width is not None and _total(heads, cells, shown) > width:
        optional = [at for at in shown if heads[at].optional]
        if not optional:
            return _as_list(heads, cells)
        shown.remove(optional[-1])
    widths = {at: _widest(heads, cells, at) for at in shown}
    lines = [[Cell(head.head, {"bold": True}) for head in heads], *cells]
    return [_line([(row[at], widths[at], heads[at].right) for at in shown]) for row in lines]


def print_table(
    console: Console, title: str, columns: Sequence[Column | str], rows: Sequence[Sequence[Cell | str]]
) -> None:
    """Prints a table on rich's console. Lines that are wider than its terminal are not folded."""
    from rich.text import Text

    lines = table_lines(columns, rows, console.width if console.is_terminal else None)
    for line in (click.style(title, bold=True), *lines):
        console.print(Text.from_ansi(line), soft_wrap=True)


def _escaped(cell: Cell | str) -> Cell:
    return Cell(for_terminal(cell)) if isinstance(cell, str) else cell._replace(text=for_terminal(cell.text))


def _line(cells: Sequence[tuple[Cell, int, bool]]) -> str:
    parts = []
    for cell, width, right in cells:
        blank = " " * (width - _columns(cell.text))
        text = click.style(cell.text, **cell.style) if cell.style else cell.text
        parts.append(blank + text if right else text + blank)
    return _GAP.join(parts).rstrip()


def _as_list(heads: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[str]:
    widest = max((_columns(head.head) for head in heads), default=0)
    lines: list[str] = []
    for row in rows:
        lines += [""] if lines else []
        for head, cell in zip(heads, row, strict=True):
            if cell.text:
                lines.append(_line([(Cell(head.head, {"bold": True}), widest, False), (cell, 0, False)]))
    return lines


def _total(heads: Sequence[Column], rows: Sequence[Sequence[Cell]], shown: Sequence[int]) -> int:
    return sum(_widest(heads, rows, at) for at in shown) + len(_GAP) * (len(shown) - 1)


def _widest(heads: Sequence[Column], rows: Sequence[Sequence[Cell]], at: int) -> int:
    return max(_columns(heads[at].head), *(_columns(row[at].text) for row in rows), 0)


def _columns(text: str) -> int:
    """Returns how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
