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
        "When quota notices are sent (set by the system), and to which sinks (users may choose). Times are in "
        "seconds. See [quota](quota.md).",
        (
            Key(
                "thresholds",
                ascending(whole(1, 100), "a list of whole numbers from 1 to 100"),
                SYSTEM,
                "Per cents of the limit at which users get an early warning.",
                (80, 90),
            ),
            Key(
                "hysteresis",
                whole(0, 50),
                SYSTEM,
                "How far usage must fall below a threshold, in per cent of the limit, before it counts as fallen.",
                5,
            ),
            Key("interval", number(1, _WEEK), SYSTEM, "Interval at which all quotas are read.", 300),
            Key(
                "near-interval",
                number(1, _WEEK),
                SYSTEM,
                "The same for quotas near or over a limit.",
                30,
            ),
            Key(
                "settle",
                number(0, _WEEK),
                SYSTEM,
                "How long usage must stay below a limit before the all-clear is sent.",
                10,
            ),
            Key("remind", number(1, 52 * _WEEK), SYSTEM, "Interval of reminders while a condition lasts.", 3600),
            Key(
                "digest-after",
                whole(1, 1000),
                SYSTEM,
                "Number of notices to one user within `digest-within`; further ones are combined.",
                5,
            ),
            Key("digest-within", number(1, _WEEK), SYSTEM, "See `digest-after`.", 600),
            Key(
                "copy-to-system",
                YES_OR_NO,
                SYSTEM,
                "Whether the machine's daemon also gets the notices of users.",
                False,
            ),
            Key(
                "sinks",
                NAMES_IN_ORDER,
                USERS,
                "The sinks that users' daemons deliver notices to, by name.",
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
                "All terminals of the user, or only the one that was used last.",
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
                "How the connection is encrypted; the server's certificate is checked.",
                "none",
            ),
            _CA_FILE,
            Key(
                "user",
                PRINTABLE,
                USERS,
                "The login name; without TLS only to a server on this machine.",
                unset="no login",
            ),
            Key(
                "password-file",
                SECRET,
                USERS,
                "The password for it: a private file (0600), or a systemd credential (`LoadCredential=`).",
                unset="none",
            ),
            Key("from", PRINTABLE, USERS, "The sender.", unset="upcall@ and the host's name"),
            Key(
                "to",
                PRINTABLE,
                USERS,
                "The recipient; `{name}`, before the last `@`, stands for the user's name.",
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
                "The URL that notices are posted to; `http` for this machine only.",
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
        "A table for each sink of another plugin, by its name.",
        (Key(ANY, ANYTHING, USERS, "The sink's own keys; the sink validates them.", unset="the sink's"),),
    ),
)
