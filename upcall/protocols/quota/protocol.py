"""The record of this protocol. Pure."""

from __future__ import annotations

from typing import Final

from upcall.protocols.protocol import Protocol
from upcall.protocols.quota.configuration import TABLES

PROTOCOL: Final = Protocol("quota", tables=TABLES)
