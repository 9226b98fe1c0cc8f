"""Checks each file of the configuration, then merges them key by key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from upcall.config.errors import ConfigError
from upcall.config.files import Source, read
from upcall.config.keys import find, tree
from upcall.config.lines import Path, lines, spelled
from upcall.config.table import ANY, SYSTEM, USERS, Key

_PLACE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")  # of tomllib's errors


class Said:
    """What one file says, and all that is wrong with it."""

    def __init__(self, source: Source, text: str | None = None) -> None:
        """`text`: what is in the file; None reads it. Never raises: see `problems`."""
        self.source = source
        self.there = source.masked is None
        self.values: dict[Path, Any] = {}  # checked and converted
        self.tables: list[Path] = []
        self.problems: list[ConfigError] = []
        self._text: str = ""
        self._lines: dict[Path, int] | None = None
        try:
            if source.problem is not None:
                raise source.problem
            if source.masked is None:
                self._take_file(read(source.file) if text is None else text)
        except ConfigError as error:
            self.problems.append(error)

    def line(self, path: Path) -> int | None:
        """The line in which a key or a table is named, if it can be found."""
        if self._lines is None:
            self._lines = lines(self._text)
        return self._lines.get(path)

    def error(self, path: Path, why: str) -> ConfigError:
        return ConfigError(self.source.file, why, self.line(path), spelled(path))

    def _take_file(self, text: str | None) -> None:
        self.there = text is not None
        self._text = text or ""
        try:
            told = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise _where(self.source, self._text, str(error)) from None
        except ValueError as error:  # int()'s own, of a number with more than 4300 digits
            raise ConfigError(self.source.file, str(error)) from None
        except RecursionError:
            raise ConfigError(self.source.file, "is nested too deeply") from None
        self._take(told, tree(), ())

    def _take(self, told: Mapping[str, Any], known: Mapping[str, Any], above: Path) -> None:
        for name, value in told.items():
            path, found = (*above, name), known.get(name, known.get(ANY))
            if isinstance(found, Key):
                self._take_key(path, found, value)
            elif found is None:
                self.problems.append(self.error(path, f"unknown; {_meant(path, known)}"))
            elif not isinstance(value, dict):
                self.problems.append(self.error(path, "a table is wanted"))
            else:
                self.tables.append(path)
                self._take(value, found, path)

    def _take_key(self, path: Path, key: Key, value: object) -> None:
        try:
            if key.scope == SYSTEM and self.source.scope == USERS:
                raise ValueError("only the system's configuration can set this, not a user's own")
            self.values[path] = key.kind.checked(value)
        except ValueError as error:
            self.problems.append(self.error(path, str(error)))


class Setting(NamedTuple):
    """The value of a key, and who says so: the file, or the system's and the user's if they say it together."""

    value: Any
    by: tuple[Said, ...]


def laid_over(files: Sequence[Said]) -> dict[Path, Setting]:
    """Every key that is set. Later files replace what earlier ones say, lists and all; but where a user can only
    narrow a list, what remains is what both name."""
    settings: dict[Path, Setting] = {}
    system: dict[Path, Setting] = {}
    for said in files:
        for path, value in said.values.items():
            by: tuple[Said, ...] = (said,)
            key = find(path)
            if key is not None and key.narrows:
                if said.source.scope == SYSTEM:
                    system[path] = Setting(value, by)
                elif path in system:
                    value, by = system[path].value & value, (*system[path].by, said)
            settings[path] = Setting(value, by)
    return settings


def nested(files: Sequence[Said]) -> dict[str, Any]:
    """The same values as tables in tables. A table that a file names is there, even if it is empty."""
    root: dict[str, Any] = {}
    for path in (table for said in files for table in said.tables):
        _at(root, path)
    for path, setting in laid_over(files).items():
        _at(root, path[:-1])[path[-1]] = setting.value
    return root


def _at(root: dict[str, Any], path: Path) -> dict[str, Any]:
    for name in path:
        root = root.setdefault(name, {})
    return root


def _where(source: Source, text: str, why: str) -> ConfigError:
    """tomllib says line and column in words."""
    place = _PLACE.search(why)
    if place is None:
        return ConfigError(source.file, why)
    line = int(place[1]) if place[1] else text.count("\n") + (not text.endswith("\n"))
    column = f" in column {place[2]}" if place[2] else " at the end"
    return ConfigError(source.file, why[: place.start()] + column, line)


def _meant(path: Path, known: Mapping[str, Any]) -> str:
    from difflib import get_close_matches  # only who has misspelt something pays for it

    if close := get_close_matches(path[-1], known, 1):
        return f"is {spelled((*path[:-1], close[0]))} meant?"
    return f"{', '.join(spelled((*path[:-1], name)) for name in known)} can be set here"
