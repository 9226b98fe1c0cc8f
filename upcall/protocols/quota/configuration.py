"""Describes the configuration tables of quotas. Pure."""

from __future__ import annotations

from typing import Final

from upcall.config.kinds import (
    ANYTHING,
    NAMES_IN_ORDER,
    PATH,
    PRINTABLE,
    SECRET,
    URL,
    YES_OR_NO,
    ascending,
    number,
    one_of,
    whole,
)
from upcall.config.table import ANY, SYSTEM, USERS, Key, Table

_WEEK: Final = 604800.0

_CA_FILE: Final = Key("ca-file", PATH, USERS, "Certificates to check the server's against, PEM.", unset="the system's")

TABLES: Final = (
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
                "Whether the machine's daemon hears what users are told, too.",
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
                "The same for the machine's daemon. In users' files it has no effect.",
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
            _CA_FILE,
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
            _CA_FILE,
        ),
    ),
    Table(
        "quota.sink.*",
        "A table for each sink that somebody else wrote, by its name.",
        (Key(ANY, ANYTHING, USERS, "What the sink lets you choose; it checks that itself.", unset="the sink's"),),
    ),
)
