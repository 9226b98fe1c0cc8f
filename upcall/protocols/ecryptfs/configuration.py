"""Defines the configuration tables of keys. Pure."""

from __future__ import annotations

from typing import Final

from upcall.config.kinds import some_of, whole
from upcall.config.table import USERS, Key, Table

TABLES: Final = (
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
)
