"""Resolves names for the kernel: keys of type dns_resolver, which CIFS, NFS, Ceph and AFS request.

Formats: upcall/protocols/request_key/dns_resolver.py. The answers are those of key.dns_resolver(8), except that a key
expires with its DNS records.
"""

from __future__ import annotations

import errno
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcall.core.errors import Refused
from upcall.protocols.request_key.dns_resolver import (
    TYPE,
    Options,
    Query,
    Text,
    pack_text,
    take_callout,
    take_description,
    take_payload,
)
from upcall.protocols.request_key.messages import Instance, pack_instance, take_ask
from upcall.wire.envelope import Envelope

if TYPE_CHECKING:
    from upcall_dns.names import Names

LANES = 4  # names are spread over these: silent name servers must not block all names, nor use all workers
PATIENCE = 5.0  # seconds, the time-out of a request without a deadline
MARGIN = 0.1  # seconds before the deadline: refuses with a reason before the broker refuses with "timed-out"


class DnsHandler:
    """A Handler for dns_resolver. The arguments replace the system's files and port 53, for tests and measurements."""

    services: tuple[str, ...] = (TYPE,)

    def __init__(
        self, resolv_conf: Path = Path("/etc/resolv.conf"), hosts: Path = Path("/etc/hosts"), port: int = 53
    ) -> None:
        self._resolv_conf, self._hosts, self._port = resolv_conf, hosts, port

    def lane(self, envelope: Envelope) -> str:
        return f"{TYPE} {zlib.crc32(take_ask(envelope.body).description) % LANES}"

    def answer(self, envelope: Envelope) -> bytes:
        """Returns the body of an Instance. PeerError if the request is malformed; Refused if no name server
        answers."""
        return pack_instance(self._look_up(envelope.body, envelope.deadline_ns / 1e9))

    def explain(self, ask: bytes, contact: bool = False) -> dict[str, Any]:
        """Implements upcall.handler.Explaining: reports the sources of the answer, and with `contact`, the answer."""
        asked = take_ask(ask)
        take_callout(asked.callout, take_description(asked.description))
        told = {"answer": "would answer", "why": f"by {self._hosts} and the name servers of {self._resolv_conf}"}
        if contact:
            try:
                found = self._look_up(ask, 0.0)
                told["why"] += f": {found.expiry} s, {take_payload(found.payload)}"
            except Refused as refused:
                told = {"answer": refused.reason, "why": refused.why}
        return {**told, "credential": None, "candidates": []}

    def _look_up(self, body: bytes, deadline: float) -> Instance:
        """Resolves the name of an Ask. `deadline`: seconds of CLOCK_MONOTONIC; 0: none."""
        from upcall_dns.names import Names  # imports dnspython: 50 ms and 10 MB

        ask = take_ask(body)
        query = take_description(ask.description)
        options = take_callout(ask.callout, query)
        names = Names(self._resolv_conf, self._hosts, self._port, (deadline or time.monotonic() + PATIENCE) - MARGIN)
        return _instance(names, query, options)


def _instance(names: Names, query: Query, options: Options) -> Instance:
    """Returns the key's payload and expiry. A negative answer is cached, too, for the time that the name server
    says."""
    from upcall_dns import cells
    from upcall_dns.names import NotThere

    try:
        if query.kind == "afsdb":
            found, ttl = cells.look_up(names, query.name, options)
            return Instance(ttl, found)
        addresses, ttl, _ = names.addresses(query.name, options.families)
        return Instance(ttl, pack_text(Text(addresses if options.several else addresses[:1])))
    except NotThere as no:
        return Instance(no.ttl, pack_text(Text((), errno.ENODATA)))


handler = DnsHandler()
