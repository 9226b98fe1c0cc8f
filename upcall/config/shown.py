"""Formats the configuration for people: values in TOML, and their origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from upcall.config.keys import find, keys
from upcall.config.layers import Said, laid_over
from upcall.config.lines import Path, spelled
from upcall.config.table import ANY, Key


class Shown(NamedTuple):
    """A key with its effective value. `origin`: (file, line if known) of the files that set it; empty for a
    default."""

    path: Path
    key: Key
    value: Any
    origin: tuple[tuple[str, int | None], ...]

    @property
    def name(self) -> str:
        """The key's path as written in TOML."""
        return spelled(self.path)

    def text(self) -> str:
        """Returns the value in TOML, or a description of the behaviour without one."""
        return self.key.unset if not self.origin and self.key.default is None else as_toml(self.value)

    def where(self) -> str:
        """Returns the origin for people."""
        return " and ".join(file if line is None else f"{file}:{line}" for file, line in self.origin) or "default"


def effective(files: Sequence[Said]) -> Iterator[Shown]:
    """Yields every key in the order of the registry, then keys of tables that only plugins know."""
    settings = laid_over(files)
    for path, key in keys().items():
        if ANY not in path and path not in settings:
            yield Shown(path, key, key.default, ())
        elif path in settings:
            yield _set(path, key, settings[path].value, settings[path].by)
    for path, setting in settings.items():
        key_of = find(path)
        if path not in keys() and key_of is not None:
            yield _set(path, key_of, setting.value, setting.by)


def _set(path: Path, key: Key, value: Any, by: Sequence[Said]) -> Shown:
    return Shown(path, key, value, tuple((str(said.source.file), said.line(path)) for said in by))


def plain(value: object) -> object:
    """Returns a value as it was in the file, for JSON; dates as text."""
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def as_toml(value: object) -> str:
    """Returns the value on one line. Tables are written as JSON; only third-party sinks have any."""
    return json.dumps(plain(value), ensure_ascii=False)
