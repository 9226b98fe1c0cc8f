"""What commands print, and how: colours, verbosity, tables, and text of others in a terminal.

Every command prints through `click.echo` or this module, so that --color, --quiet, --verbose and NO_COLOR work alike.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from upcall.observe.tables import Cell as Cell
from upcall.observe.tables import Column as Column
from upcall.observe.tables import for_terminal as for_terminal
from upcall.observe.tables import table_lines as table_lines

if TYPE_CHECKING:
    from rich.console import Console

COLOURS: Final = ("auto", "always", "never")
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
        click.echo(f"upcall: note: {for_terminal(text)}", err=True)


def detail(text: str) -> None:
    """Prints how the result came about, on standard error. With --verbose only."""
    if verbose():
        click.echo(f"upcall: {for_terminal(text)}", err=True)


# --- tables ------------------------------------------------------------------------------------------------------


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
