"""Every key of the configuration, described once: for the checker, `upcall config` and docs/configuration.md.

A new key is one entry in `TABLES`. Then `make docs` writes it into the documentation.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

from upcall.config.kinds import (
    ANYTHING,
    COMMAND,
    NAMES,
    NAMES_IN_ORDER,
    PATH,
    PLACES,
    PRINTABLE,
    SECRET,
    URL,
    USER,
    WHERE,
    YES_OR_NO,
    Kind,
    ascending,
    number,
    one_of,
    some_of,
    whole,
)
from upcall.config.lines import Path, dotted

# Who may set a key: only the system's files, or each user's own, too.
SYSTEM: Final = "system"
USERS: Final = "user"
ANY: Final = "*"  # in the place of a name: whatever stands there

_WEEK: Final = 604800.0


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


TABLES: Final = (
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
        'request-key."cifs.spnego"',
        "Kerberos sessions of the kernel's CIFS client.",
        (
            Key(
                "without-daemon",
                one_of("refuse", "start", "machine"),
                SYSTEM,
                "What becomes of a request whose user has no daemon: it is refused, or waits until one was "
                "started, or the machine's daemon is asked, which has the machine's keytab.",
                "refuse",
            ),
        ),
    ),
    Table(
        "request-key.dns_resolver",
        "Names that the kernel's CIFS, NFS, AFS and Ceph look up.",
        (
            Key(
                "without-daemon",
                one_of("refuse", "start"),
                SYSTEM,
                "What becomes of a request if `user` has no daemon.",
                "refuse",
            ),
            Key("user", USER, SYSTEM, "Whose daemon looks names up; for root the machine's does.", "root"),
        ),
    ),
    Table(
        "keys",
        "When a daemon forgets passphrases and PINs and closes keys by itself ([keys](keys.md#locking)).",
        (
            Key(
                "lock-after",
                whole(0, 0xFFFFFFFF),
                USERS,
                "For how many seconds a key may be unused, those counted in which the machine sleeps; 0: no end.",
                0,
            ),
            Key(
                "lock-on",
                some_of("suspend", "screen-lock", "logout"),
                USERS,
                "What locks all keys, as logind says. For root's daemon and the machine's only `suspend` counts.",
                ("suspend", "screen-lock", "logout"),
            ),
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
    Table(
        "quota",
        "What people are told about quotas, and when, is the system's affair; where they are told is their own. "
        "Times are in seconds. See [quota](quota.md).",
        (
            Key(
                "thresholds",
                ascending(whole(1, 100), "a list of whole numbers from 1 to 100"),
                SYSTEM,
                "At how many per cent of the limit people are told early.",
                (80, 90),
            ),
            Key(
                "hysteresis",
                whole(0, 50),
                SYSTEM,
                "How far usage must fall below a threshold, in per cent of the limit, before it counts as fallen.",
                5,
            ),
            Key("interval", number(1, _WEEK), SYSTEM, "Between two readings of all quotas.", 300),
            Key(
                "near-interval",
                number(1, _WEEK),
                SYSTEM,
                "The same for quotas near a limit, or over it.",
                30,
            ),
            Key(
                "settle",
                number(0, _WEEK),
                SYSTEM,
                "How long somebody must have been below a limit before it is called over.",
                10,
            ),
            Key("remind", number(1, 52 * _WEEK), SYSTEM, "Until a warning that goes on is told again.", 3600),
            Key(
                "digest-after",
                whole(1, 1000),
                SYSTEM,
                "So many notices to one person within `digest-within`; what is more is put together.",
                5,
            ),
            Key("digest-within", number(1, _WEEK), SYSTEM, "See `digest-after`.", 600),
            Key(
                "copy-to-system",
                YES_OR_NO,
                SYSTEM,
                "Whether the system's daemon, which is root's, hears what users are told, too.",
                False,
            ),
            Key(
                "sinks",
                NAMES_IN_ORDER,
                USERS,
                "Where people's daemons tell them: the names of sinks.",
                ("desktop", "terminal", "log"),
            ),
            Key(
                "system-sinks",
                NAMES_IN_ORDER,
                USERS,
                "The same for the system's daemon, which is root's. In the files of other users it has no effect.",
                unset='["log", "dbus"], with "mail" and "webhook" if they have a table',
            ),
        ),
    ),
    Table(
        "quota.terminal",
        "The sink `terminal`.",
        (
            Key(
                "which",
                one_of("all", "last"),
                USERS,
                "All terminals of the person, or only the one that was used last.",
                "all",
            ),
        ),
    ),
    Table(
        "quota.mail",
        "The sink `mail`.",
        (
            Key("host", PRINTABLE, USERS, "The mail server.", "localhost"),
            Key("port", whole(1, 65535), USERS, "Its port.", unset="25; 587 for starttls; 465 for tls"),
            Key(
                "security",
                one_of("none", "starttls", "tls"),
                USERS,
                "How the connection is kept from others; the server's certificate is checked.",
                "none",
            ),
            Key(
                "ca-file",
                PATH,
                USERS,
                "Certificates to check the server's against, PEM.",
                unset="the system's",
            ),
            Key(
                "user",
                PRINTABLE,
                USERS,
                "Whom to log in as; without TLS only on this machine.",
                unset="no login",
            ),
            Key(
                "password-file",
                SECRET,
                USERS,
                "The password for it: a file that nobody else can read, or a systemd credential (`LoadCredential=`).",
                unset="none",
            ),
            Key("from", PRINTABLE, USERS, "The sender.", unset="upcall@ and the host's name"),
            Key(
                "to",
                PRINTABLE,
                USERS,
                "Whom to write to; `{name}`, before the last `@`, stands for the name of the person.",
                "{name}",
            ),
        ),
    ),
    Table(
        "quota.webhook",
        "The sink `webhook`.",
        (
            Key(
                "url",
                URL,
                USERS,
                "Where notices are posted to; `http` for this machine only.",
                unset="must be set",
            ),
            Key(
                "token-file",
                SECRET,
                USERS,
                "A token for `Authorization: Bearer`, as `quota.mail.password-file`.",
                unset="none",
            ),
            Key(
                "ca-file",
                PATH,
                USERS,
                "Certificates to check the server's against, PEM.",
                unset="the system's",
            ),
        ),
    ),
    Table(
        "quota.sink.*",
        "A table for each sink that somebody else wrote, by its name.",
        (Key(ANY, ANYTHING, USERS, "What the sink lets you choose; it checks that itself.", unset="the sink's"),),
    ),
)


@functools.cache
def tree() -> dict[str, Any]:
    """The same by name: tables in tables, and a Key at the end of each path."""
    root: dict[str, Any] = {}
    for path, key in keys().items():
        here = root
        for name in path[:-1]:
            here = here.setdefault(name, {})
        here[path[-1]] = key
    return root


@functools.cache
def keys() -> dict[Path, Key]:
    """All keys, by the whole path of each, in the order of `TABLES`."""
    return {(*table_path(table), key.name): key for table in TABLES for key in table.keys}


def defaults(path: Path) -> dict[str, Any]:
    """The defaults of one table, as `kinds` has them."""
    return {key.name: key.default for at, key in keys().items() if at[:-1] == path}


def table_path(table: Table) -> Path:
    name = table.name.removesuffix(f".{ANY}")
    return dotted(name) if name == table.name else (*dotted(name), ANY)


def find(path: Path) -> Key | None:
    """The key at this path; a name stands for itself, or for `ANY`."""
    here: Any = tree()
    for name in path:
        if not isinstance(here, dict):
            return None
        here = here.get(name, here.get(ANY))
    return here if isinstance(here, Key) else None
