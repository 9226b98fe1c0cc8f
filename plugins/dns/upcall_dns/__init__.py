"""Looks names up for the kernel: keys of type dns_resolver, as CIFS, NFS, Ceph and AFS ask for them.

What is asked for and answered: upcall/protocols/request_key/dns_resolver.py. The answers are those of
key.dns_resolver(8), but that a key lives as long as its records do.
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

LANES = 4  # a name whose servers are silent must not keep every other name waiting, nor take all workers
PATIENCE = 5.0  # seconds, if the request says nothing
MARGIN = 0.1  # seconds before the deadline: a refusal of ours says more than the broker's


class DnsHandler:
    """Tests and measurements say where to look; everybody else gets the system's."""

    services: tuple[str, ...] = (TYPE,)

    def __init__(
        self, resolv_conf: Path = Path("/etc/resolv.conf"), hosts: Path = Path("/etc/hosts"), port: int = 53
    ) -> None:
        self._resolv_conf, self._hosts, self._port = resolv_conf, hosts, port

    def lane(self, envelope: Envelope) -> str:
        return f"{TYPE} {zlib.crc32(take_ask(envelope.body).description) % LANES}"

    def answer(self, envelope: Envelope) -> bytes:
        """An Instance. PeerError for what makes no sense, Refused if no name server says anything."""
        return pack_instance(self._look_up(envelope.body, envelope.deadline_ns / 1e9))

    def explain(self, ask: bytes, contact: bool = False) -> dict[str, Any]:
        """As upcall.handler.Explaining: what is looked at, and with `contact`, what it says."""
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
        """`deadline` is on the monotonic clock; 0: there is none."""
        from upcall_dns.names import Names  # which imports dnspython: 50 ms and 10 MB

        ask = take_ask(body)
        query = take_description(ask.description)
        options = take_callout(ask.callout, query)
        names = Names(self._resolv_conf, self._hosts, self._port, (deadline or time.monotonic() + PATIENCE) - MARGIN)
        return _instance(names, query, options)


def _instance(names: Names, query: Query, options: Options) -> Instance:
    """What the key is to hold: also a no, for as long as the name server says."""
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
