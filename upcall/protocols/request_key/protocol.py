"""The record of this protocol. Pure."""

from __future__ import annotations

from typing import Final

from upcall.protocols.protocol import Protocol
from upcall.protocols.request_key.configuration import TABLES
from upcall.protocols.request_key.key_types import KEY_TYPES

PROTOCOL: Final = Protocol(
    "request_key",
    tuple(key_type.service for key_type in KEY_TYPES.values()),
    TABLES,
    tuple(key_type.kernel for key_type in KEY_TYPES.values()),
)
