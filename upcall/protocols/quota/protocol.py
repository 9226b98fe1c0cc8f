"""Describes the protocol to the rest of upcall. Its source has a process of its own:
upcall/protocols/quota/process.py.
"""

from __future__ import annotations

from typing import Final

from upcall.core.service import Notice
from upcall.protocols.protocol import Protocol
from upcall.protocols.quota.configuration import TABLES

PROTOCOL: Final = Protocol("quota", notices=(Notice("quota", network=True),), tables=TABLES)
