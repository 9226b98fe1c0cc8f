"""Defines the configuration tables of the key types: one table per type. Pure."""

from __future__ import annotations

from typing import Final

from upcall.config.kinds import USER, one_of
from upcall.config.table import SYSTEM, Key, Table
from upcall.protocols.request_key.key_type import KeyType
from upcall.protocols.request_key.key_types import KEY_TYPES

_FAMILY: Final = (
    "request-key.TYPE",
    "Which daemon answers for keys of one type; `upcall config show request-key` lists the types. A type whose name "
    'has a dot stands in quotes: `[request-key."cifs.spnego"]`.',
)


def _table(key_type: KeyType) -> Table:
    ways, about = ["refuse", "start"], "the request is refused, or waits until one was started"
    if key_type.machine:
        ways.append("machine")
        about += ", or the machine's daemon is asked, which has the machine's keytab"
    whose = "If `user` has no daemon" if key_type.of_the_system else "If a request's user has no daemon"
    keys = [Key("without-daemon", one_of(*ways), SYSTEM, f"{whose}: {about}.", "refuse")]
    if key_type.of_the_system:
        whose = "for root, the machine's" if key_type.network else "root's if nothing else is said"
        keys.append(Key("user", USER, SYSTEM, f"Whose daemon answers; {whose}.", "root"))
    name = f'"{key_type.name}"' if "." in key_type.name else key_type.name
    return Table(f"request-key.{name}", key_type.about, tuple(keys), _FAMILY)


TABLES: Final = tuple(_table(key_type) for key_type in KEY_TYPES.values())
