"""Describes each key of the configuration, for the checker, `upcall config` and docs/configuration.md.

A new key is one entry in `_GENERAL`, or in the tables of a protocol. Then `make docs` writes it into the
documentation.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from upcall.config.kinds import COMMAND, NAMES, PLACES, USER, WHERE, YES_OR_NO, one_of, whole
from upcall.config.lines import Path, dotted
from upcall.config.table import ANY, SYSTEM, USERS, Key, Table
from upcall.protocols.catalogue import PROTOCOLS

_GENERAL: Final = (
    Table(
        "plugins",
        "Which plugins may be loaded.",
        (
            Key(
                "allow",
                NAMES,
                USERS,
                "The key modules, handlers and sinks that may be loaded, by name. A user can narrow the system's "
                "list, and never widen it.",
                unset="all that are installed",
                narrows=True,
            ),
        ),
    ),
    Table(
        "broker",
        "Limits the daemons of each user. The uids of a range in /etc/subuid count as the user who owns the range.",
        (
            Key(
                "daemons",
                whole(1, 65536),
                SYSTEM,
                "How many daemons may be registered; root's is admitted always.",
                2048,
            ),
            Key("daemons-per-person", whole(1, 65536), SYSTEM, "How many of them one user may have.", 16),
        ),
    ),
    Table(
        "daemon",
        "How the broker starts a user's daemon, where [request-key] allows it; and the user of the machine's daemon.",
        (
            Key(
                "machine-user",
                USER,
                SYSTEM,
                "The user of the machine's daemon, which serves the network for root. `root`: root's own daemon does, "
                "with root's tickets; an attacker who takes it over then has root's rights.",
                unset='"upcall", if there is such a system user; otherwise "root"',
            ),
            Key(
                "start",
                COMMAND,
                SYSTEM,
                "The command that starts the daemon of a user. `{uid}` in it stands for the user's uid.",
                unset="`systemctl start user@{uid}.service`; without systemd `upcall session start {uid}`",
            ),
        ),
    ),
    Table(
        "hardening",
        "Privilege dropping at start-up ([operations](operations.md)). Read when broker and daemons start.",
        (
            Key(
                "broker",
                YES_OR_NO,
                SYSTEM,
                "Whether broker and quota source drop their privileges; false is for debugging.",
                True,
            ),
            Key("daemon", YES_OR_NO, SYSTEM, "The same for daemons.", True),
            Key(
                "writable",
                PLACES,
                USERS,
                "Places beneath which plugins may write, besides those that daemons need themselves; `~/` is the "
                "user's home. If the system's file has this key, a user can remove places from it, but add none.",
                unset="no others",
                narrows=True,
            ),
        ),
    ),
    Table(
        "trust",
        "Whether root runs only code that no other user can change ([operations](operations.md)). Read when root's "
        "broker or daemon starts, and when it loads a plugin.",
        (
            Key(
                "check",
                YES_OR_NO,
                SYSTEM,
                "false lets root run code that others can change, such as a developer's clone: each user who can "
                "change it has root's rights.",
                True,
            ),
        ),
    ),
    Table(
        "log",
        "Logs a record of each request ([observing](observing.md)): in the broker by the system's files, in a daemon "
        "by its user's, too. Read when they start.",
        (
            Key("requests", YES_OR_NO, USERS, "Whether records are written.", False),
            Key("to", WHERE, USERS, "Where they are written to.", "stderr"),
        ),
    ),
    Table(
        "keyring",
        "Passwords in the kernel's keyrings, by the keyring library ([keys](keys.md)).",
        (
            Key("timeout", whole(0, 0xFFFFFFFF), USERS, "Seconds for which a password is kept; 0: without end.", 0),
            Key(
                "where",
                one_of("persistent", "user"),
                USERS,
                "In which of the user's keyrings: the persistent one, which outlives the last logout for some days, "
                "or the user keyring.",
                "persistent",
            ),
        ),
    ),
)
TABLES: Final = (*_GENERAL, *(table for protocol in PROTOCOLS for table in protocol.tables))


@functools.cache
def tree() -> dict[str, Any]:
    """Returns the keys as nested tables by name, with a Key at the end of each path."""
    root: dict[str, Any] = {}
    for path, key in keys().items():
        here = root
        for name in path[:-1]:
            here = here.setdefault(name, {})
        here[path[-1]] = key
    return root


@functools.cache
def keys() -> dict[Path, Key]:
    """Returns all keys by their whole path, in the order of `TABLES`."""
    return {(*table_path(table), key.name): key for table in TABLES for key in table.keys}


def defaults(path: Path) -> dict[str, Any]:
    """Returns the defaults of one table by key, converted."""
    return {key.name: key.default for at, key in keys().items() if at[:-1] == path}


def table_path(table: Table) -> Path:
    """Returns the path of a table."""
    name = table.name.removesuffix(f".{ANY}")
    return dotted(name) if name == table.name else (*dotted(name), ANY)


def find(path: Path) -> Key | None:
    """Returns the key at this path; a name matches itself, or `ANY`. None if there is none."""
    here: Any = tree()
    for name in path:
        if not isinstance(here, dict):
            return None
        here = here.get(name, here.get(ANY))
    return here if isinstance(here, Key) else None
