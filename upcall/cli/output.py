"""What commands print, and how: colours, verbosity, tables, and text of others in a terminal.

Every command prints through `click.echo` or this module, so that --color, --quiet, --verbose and NO_COLOR work alike.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

if TYPE_CHECKING:
    from rich.console import Console

COLOURS: Final = ("auto", "always", "never")
_GAP: Final = "  "
_UNBOUNDED: Final = 100_000  # columns where there is no terminal: nothing is wrapped or cut off


class _Options:
    """The options --color, --quiet and --verbose of the running command."""

    def __init__(self) -> None:
        self.colour = "auto"
        self.verbosity = 0


_options = _Options()


def reset() -> None:
    """Forgets the options of an earlier command in this process."""
    _options.__init__()  # type: ignore[misc]


def set_colour(choice: str) -> None:
    """Sets the colours for this command. `choice`: one of COLOURS."""
    _options.colour = choice


def add_verbosity(count: int) -> None:
    """Adds to the verbosity: 1 for each --verbose, -1 for --quiet."""
    _options.verbosity += count


def quiet() -> bool:
    return _options.verbosity < 0


def verbose() -> bool:
    return _options.verbosity > 0


def colours() -> bool | None:
    """Returns whether colours are printed: True or False, or None if that is for each stream to decide: a terminal
    has them. The option has precedence over NO_COLOR (https://no-color.org)."""
    if _options.colour == "auto":
        return False if os.environ.get("NO_COLOR") else None
    return _options.colour == "always"


# --- lines -------------------------------------------------------------------------------------------------------


def done(text: str) -> None:
    """Prints what was done, on standard output. Not with --quiet."""
    if not quiet():
        click.echo(text)


def note(text: str) -> None:
    """Prints what is worth knowing beside the result, on standard error. Not with --quiet."""
    if not quiet():
        click.echo(f"upcall: note: {text}", err=True)


def detail(text: str) -> None:
    """Prints how the result came about, on standard error. With --verbose only."""
    if verbose():
        click.echo(f"upcall: {text}", err=True)


def for_terminal(text: str) -> str:
    """Escapes control characters, so that text of others cannot inject escape sequences into a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- tables ------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table. `optional`: it is left out, the last one first, where the terminal is too narrow."""

    head: str
    right: bool = False
    optional: bool = False


class Cell(NamedTuple):
    """A coloured cell. `style`: arguments of click.style."""

    text: str
    style: dict[str, Any] = {}


def table(columns: Sequence[Column | str], rows: Sequence[Sequence[Cell | str]], title: str = "") -> None:
    """Prints a table on standard output: whole cells always, each row on one line.

    Where it does not fit into the terminal, optional columns are left out; where that is not enough, each row is
    printed as a list of "head: cell". Control characters are escaped.
    """
    for line in table_lines(columns, rows, _width()):
        if title:
            click.echo(click.style(title, bold=True))
            title = ""
        click.echo(line)


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


def _width() -> int | None:
    """Returns the terminal's columns; None if standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def console(err: bool = False) -> Console:
    """Returns rich's console for live displays and progress, with this command's colours. Where there is no terminal,
    it neither wraps nor cuts off."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """rich would exit with 1 here: the exit code for a closed pipe is the same for every command."""
            raise

    stream = sys.stderr if err else sys.stdout
    colour = colours()
    return _Console(
        stderr=err,
        no_color=colour is False,
        color_system="standard" if colour else "auto",
        force_terminal=None,
        force_interactive=stream.isatty(),
        width=None if stream.isatty() else _UNBOUNDED,
        soft_wrap=not stream.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
    )
