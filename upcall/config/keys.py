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
        "How much of the broker one person can take. The uids of a range in /etc/subuid count as the person who owns "
        "the range.",
        (
            Key(
                "daemons",
                whole(1, 65536),
                SYSTEM,
                "How many daemons may be registered; root's is admitted always.",
                2048,
            ),
            Key("daemons-per-person", whole(1, 65536), SYSTEM, "How many of them may be one person's.", 16),
        ),
    ),
    Table(
        "daemon",
        "How the broker starts a user's daemon, where [request-key] says that it is to; and whose the machine's is.",
        (
            Key(
                "machine-user",
                USER,
                SYSTEM,
                "As which user the machine's daemon runs, which answers the network's services for root. `root`: "
                "root's own daemon does, with root's tickets, and with root's rights for whoever breaks into it.",
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
        "What broker and daemons take from themselves when they start ([operations](operations.md)). Read when they "
        "start.",
        (
            Key(
                "broker",
                YES_OR_NO,
                SYSTEM,
                "Whether the broker does, and the quota source; false is for looking for a fault.",
                True,
            ),
            Key("daemon", YES_OR_NO, SYSTEM, "The same for daemons.", True),
            Key(
                "writable",
                PLACES,
                USERS,
                "Places beneath which plugins may write, besides those that daemons need themselves; `~/` is the "
                "user's home. If the system says it, a user can take away from it, and add nothing.",
                unset="no others",
                narrows=True,
            ),
        ),
    ),
    Table(
        "trust",
        "Whether root runs only what nobody else can change ([operations](operations.md)). Read when root's broker or "
        "daemon starts, and when it loads a plugin.",
        (
            Key(
                "check",
                YES_OR_NO,
                SYSTEM,
                "false lets root run what others can change, in a clone that a developer owns, say: who can change "
                "it, is root.",
                True,
            ),
        ),
    ),
    Table(
        "log",
        "A record of each request ([observing](observing.md)): the broker's as the system says, a daemon's as its "
        "user does. Read when they start.",
        (
            Key("requests", YES_OR_NO, USERS, "Whether there are any.", False),
            Key("to", WHERE, USERS, "Where they are written to.", "stderr"),
        ),
    ),
    Table(
        "keyring",
        "Passwords in the kernel's keyrings, by the keyring library ([keys](keys.md)).",
        (
            Key("timeout", whole(0, 0xFFFFFFFF), USERS, "For how many seconds a password is kept; 0: no end.", 0),
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
