"""The record of this protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from upcall.protocols.protocol import Given, Protocol
from upcall.protocols.quota.configuration import TABLES

if TYPE_CHECKING:
    from upcall.process.source import MakeSource


def source(given: Given) -> MakeSource | None:
    if given.quota == "no":
        return None
    from upcall.protocols.quota.setup import configured
    from upcall.protocols.quota.source import Quota, with_room_kept

    setup = with_room_kept(configured(given.place, required=given.quota == "yes"))
    return lambda loop, router, log, people: Quota(loop, router, log, setup)


PROTOCOL: Final = Protocol("quota", tables=TABLES, source=source)
