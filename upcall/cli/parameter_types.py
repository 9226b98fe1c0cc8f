"""The types of options and arguments that several commands share: what does not fit is refused before anything
happens, with one line that says what would fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from upcall.core.suggestion import did_you_mean

if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # not generic before click 8.2

DAY: Final = 86_400.0  # seconds: the most that a client waits
WEEK: Final = 604_800.0  # seconds; poll(2) takes 24 days at most


class Seconds(_Type):
    """A number of seconds from `least` to `most`. "inf" is taken if `forever`, and is math.inf."""

    name = "seconds"

    def __init__(self, least: float = 0.0, most: float = WEEK, forever: bool = False, above: bool = False) -> None:
        """`above`: `least` itself is refused."""
        self._least, self._most, self._forever, self._above = least, most, forever, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if self._forever and number == math.inf:
            return number
        if not self._least <= number <= self._most or (self._above and number == self._least):
            self.fail(f"'{_short(value)}' is not a number of seconds {self._wanted()}", param, ctx)
        return number

    def _wanted(self) -> str:
        least = f"above {self._least:g}" if self._above else f"from {self._least:g}"
        return f"{least} to {self._most:.0f}" + (", or inf" if self._forever else "")


class Known(_Type):
    """One of some names, which are looked up only when one is given. Others are refused with a suggestion."""

    def __init__(self, name: str, names: Callable[[], Iterable[str]]) -> None:
        """`name`: what it is the name of, for errors and help."""
        self.name, self._names = name, names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if text not in (names := [*self._names()]):
            suggested = did_you_mean(text, names) or f": there are {', '.join(names)}"
            self.fail(f"there is no {self.name} '{_short(text)}'{suggested}", param, ctx)
        return text


class Program(_Type):
    """A program that can be run: its path, or its name in PATH. Returns the text as it was given."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text or shutil.which(text) is None:
            self.fail(f"'{_short(text)}' is no program that can be run", param, ctx)
        return text


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


UID: Final = click.IntRange(0, 0xFFFFFFFE)
DESCRIPTOR: Final = click.IntRange(0, 0x7FFFFFFF)
FOLDER: Final = click.Path(file_okay=False, path_type=Path)
PRESENT_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)


def runtime_option(help: str = "The broker's folder.", present: bool = False) -> Callable[..., Any]:
    """Returns the option --runtime of a command that asks a broker: its folder. `present`: it must be there; a command
    that needs an answer says itself that there is no broker."""
    return click.option("--runtime", type=PRESENT_FOLDER if present else FOLDER, help=help)


def services() -> list[str]:
    """Returns the names of all services: those that upcall defines, and those of installed handlers."""
    from upcall.keys import plugins
    from upcall.protocols.catalogue import SERVICES

    return [*SERVICES, *(name for name in plugins.handlers() if name not in SERVICES)]


def outcomes() -> list[str]:
    from upcall.core.errors import REASONS

    return ["answered", *REASONS]


SERVICE: Final = Known("service", services)
OUTCOME: Final = Known("outcome", outcomes)
EXECUTABLE: Final = Program()
