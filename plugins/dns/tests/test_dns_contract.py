"""The contract of handlers, where there is no name server."""

from __future__ import annotations

import time
from pathlib import Path

from upcall_dns import DnsHandler

from upcall.core.messages import Requester
from upcall.protocols.request_key.dns_resolver import TYPE
from upcall.protocols.request_key.messages import Ask, pack_ask
from upcall.testing.handlercontract import HandlerContract
from upcall.wire.envelope import Envelope


class TestDns(HandlerContract):
    handler = DnsHandler(Path("/nonexistent/resolv.conf"), Path("/nonexistent/hosts"), port=1)

    def asking(self) -> Envelope:
        deadline = int((time.monotonic() + 5) * 1e9)
        return Envelope(1, 0, TYPE, Requester(0, 0), deadline, pack_ask(Ask(b"fs.lab.test", b"")))
