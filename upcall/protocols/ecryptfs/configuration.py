"""Defines the configuration tables of keys. Pure."""

from __future__ import annotations

from typing import Final

from upcall.config.kinds import USERS_AND_GROUPS, some_of, whole
from upcall.config.table import SYSTEM, USERS, Key, Table

TABLES: Final = (
    Table(
        "keys",
        "When a daemon forgets passphrases and PINs and closes keys by itself ([keys](keys.md#locking)).",
        (
            Key(
                "lock-after",
                whole(0, 0xFFFFFFFF),
                USERS,
                "Seconds without use after which a key locks, time asleep included; 0: never.",
                0,
            ),
            Key(
                "lock-on",
                some_of("suspend", "screen-lock", "logout"),
                USERS,
                "The logind events that lock all keys. For root's daemon and the machine's only `suspend` counts.",
                ("suspend", "screen-lock", "logout"),
            ),
        ),
    ),
    Table(
        "mount",
        "Which users may mount eCryptfs without root ([mount](mount.md)). Read at each request; the service starts "
        "only if there are any.",
        (
            Key(
                "users",
                USERS_AND_GROUPS,
                SYSTEM,
                'The users who may, by name, and groups of users after @: `["alice", "@staff"]`.',
                unset="nobody: mounting is off",
            ),
            Key("max", whole(1, 256), SYSTEM, "How many mounts each of them may have at once.", 16),
        ),
    ),
)
