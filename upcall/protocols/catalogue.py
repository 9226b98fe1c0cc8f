"""Lists all protocols, their services and notices. Code that needs all of them iterates over these. A new protocol is
one line here.
"""

from __future__ import annotations

from typing import Final

from upcall.protocols.ecryptfs.protocol import PROTOCOL as ECRYPTFS
from upcall.protocols.quota.protocol import PROTOCOL as QUOTA
from upcall.protocols.request_key.protocol import PROTOCOL as REQUEST_KEY

PROTOCOLS: Final = (ECRYPTFS, REQUEST_KEY, QUOTA)
NOTICES: Final = {notice.name: notice for protocol in PROTOCOLS for notice in protocol.notices}
SERVICES: Final = {service.name: service for protocol in PROTOCOLS for service in protocol.services}
