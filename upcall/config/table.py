"""Defines the description of a configuration key. The keys: keys.py, and `configuration.py` of each protocol. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from upcall.config.kinds import Kind

# Scopes of keys: only the system's files may set it, or each user's own, too.
SYSTEM: Final = "system"
USERS: Final = "user"
ANY: Final = "*"  # matches any name


class Key(NamedTuple):
    """A configuration key. `default`: its value if it is not set, as in TOML; `unset`: a description of the behaviour
    then, if there is no such value."""

    name: str
    kind: Kind
    scope: str
    about: str
    default: Any = None
    unset: str = ""
    narrows: bool = False  # a user's list can only remove entries of the system's list


class Table(NamedTuple):
    """A table of the configuration."""

    name: str  # as between [ and ]
    about: str
    keys: tuple[Key, ...]
    # The heading and text of the reference for all tables that differ in one name only.
    family: tuple[str, str] | None = None
