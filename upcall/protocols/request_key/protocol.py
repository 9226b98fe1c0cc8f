"""Describes request_key to the rest of upcall: its services, configuration and source."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from upcall.protocols.protocol import Given, Protocol
from upcall.protocols.request_key.configuration import TABLES
from upcall.protocols.request_key.key_types import KEY_TYPES

if TYPE_CHECKING:
    from upcall.process.source import MakeSource


def source(given: Given) -> MakeSource | None:
    """Returns the source for forwarders; None unless root: only root can verify a key by KEYCTL_DESCRIBE."""
    if os.geteuid() != 0:
        return None
    from upcall.protocols.request_key import origin
    from upcall.protocols.request_key.source import Forwarders

    path, owners = given.place.request_key_socket, given.owners
    return lambda loop, router, log, people: Forwarders(loop, router, log, people, path, origin, owners, os.geteuid())


PROTOCOL: Final = Protocol(
    "request_key",
    tuple(key_type.service for key_type in KEY_TYPES.values()),
    TABLES,
    tuple(key_type.kernel for key_type in KEY_TYPES.values()),
    source,
)
