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
from upcall.core.suggestion import did_you_mean

_PLACE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")  # in tomllib's error texts


class Said:
    """The values and errors of one file."""

    def __init__(self, source: Source, text: str | None = None) -> None:
        """`text`: the file's content; None reads the file. Never raises: see `problems`."""
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
        """Returns the line in which a key or table is first named; None if unknown."""
        if self._lines is None:
            self._lines = lines(self._text)
        return self._lines.get(path)

    def error(self, path: Path, why: str) -> ConfigError:
        """Returns an error about a key of this file."""
        return ConfigError(self.source.file, why, self.line(path), spelled(path))

    def _take_file(self, text: str | None) -> None:
        self.there = text is not None
        self._text = text or ""
        try:
            table = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise _where(self.source, self._text, str(error)) from None
        except ValueError as error:  # from int(), for a number with more than 4300 digits
            raise ConfigError(self.source.file, str(error)) from None
        except RecursionError:
            raise ConfigError(self.source.file, "is nested too deeply") from None
        self._take(table, tree(), ())

    def _take(self, table: Mapping[str, Any], known: Mapping[str, Any], above: Path) -> None:
        for name, value in table.items():
            path, found = (*above, name), known.get(name, known.get(ANY))
            if isinstance(found, Key):
                self._take_key(path, found, value)
            elif found is None:
                self.problems.append(self.error(path, f"unknown; {_meant(path, known)}"))
            elif not isinstance(value, dict):
                self.problems.append(self.error(path, "must be a table"))
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
    """The value of a key, and the files that set it: several for a list that users narrow."""

    value: Any
    by: tuple[Said, ...]


def laid_over(files: Sequence[Said]) -> dict[Path, Setting]:
    """Merges the files: returns every key that is set. Later files replace values of earlier ones; a list that users
    can only narrow becomes the intersection."""
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
    """Returns the merged values as nested tables, including empty ones."""
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
    """Returns a ConfigError with the line and column from tomllib's error text."""
    place = _PLACE.search(why)
    if place is None:
        return ConfigError(source.file, why)
    line = int(place[1]) if place[1] else text.count("\n") + (not text.endswith("\n"))
    column = f" in column {place[2]}" if place[2] else " at the end"
    return ConfigError(source.file, why[: place.start()] + column, line)


def _meant(path: Path, known: Mapping[str, Any]) -> str:
    if suggested := did_you_mean(path[-1], known, lambda name: spelled((*path[:-1], name))):
        return suggested.removeprefix("; ")
    return f"{', '.join(spelled((*path[:-1], name)) for name in known)} can be set here"
