"""Defines the description of a configuration key. The keys: keys.py, and `configuration.py` of each protocol. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from upcall.config.kinds import Kind

# Who may set a key: only the system's files, or each user's own, too.
SYSTEM: Final = "system"
USERS: Final = "user"
ANY: Final = "*"  # in the place of a name: whatever stands there


class Key(NamedTuple):
    """`default`: what holds if nobody sets it, as TOML would say it; `unset`: the same in words, if it is no value."""

    name: str
    kind: Kind
    scope: str
    about: str
    default: Any = None
    unset: str = ""
    narrows: bool = False  # a user's list takes away from the system's, and adds nothing to it


class Table(NamedTuple):
    name: str  # as it stands between [ and ]
    about: str
    keys: tuple[Key, ...]
    # The name and the text under which the reference shows all tables that differ in one name only.
    family: tuple[str, str] | None = None
