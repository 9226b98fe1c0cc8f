"""Finds the volume location servers of an AFS cell: by SRV records (RFC 5864), else by AFSDB records (RFC 1183)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

import dns.rdatatype

from upcall.core.errors import Refused
from upcall.protocols.request_key.dns_resolver import (
    FROM_DNS_AFSDB,
    FROM_DNS_SRV,
    GOOD,
    GOOD_WITH_BAD,
    CellServer,
    Options,
    ServerList,
    Text,
    is_host,
    pack_servers,
    pack_text,
)
from upcall_dns import hosts
from upcall_dns.names import MOST_ADDRESSES, NEGATIVE_TTL, Names, NotThere

PORT = 7003  # of a volume location server; AFSDB records contain no port
MOST_SERVERS = 15
_VOLUME_LOCATION = 1  # subtype of an AFSDB record; 2 is of DCE


class _Target(NamedTuple):
    name: str
    priority: int
    weight: int
    port: int


def look_up(names: Names, cell: str, options: Options) -> tuple[bytes, int]:
    """Returns (payload, seconds to live): a server list if the request allows it, otherwise text. NotThere,
    Refused."""
    source, targets, ttl = _targets(names, f"{cell.rstrip('.')}.")
    servers, ttl = _servers(names, targets, ttl, options.families)
    if options.servers:
        status = GOOD if len(servers) == len(targets) else GOOD_WITH_BAD
        return pack_servers(ServerList(source, status, servers)), ttl
    items = [
        _text(address) + (f"+{server.port}" if source == FROM_DNS_SRV else "")  # AFSDB records contain no ports
        for server in servers
        for address in server.addresses
    ]
    return pack_text(Text(tuple(dict.fromkeys(items))[:MOST_ADDRESSES])), ttl


def _targets(names: Names, cell: str) -> tuple[int, list[_Target], int]:
    """Returns (source of the records, servers, seconds to live). AFSDB records are used only without SRV records."""
    failure: Refused | None = None
    ttl = NEGATIVE_TTL
    for source, name, kind in (
        (FROM_DNS_SRV, f"_afs3-vlserver._udp.{cell}", "SRV"),
        (FROM_DNS_AFSDB, cell, "AFSDB"),
    ):
        try:
            told = names.records(name, kind)
        except Refused as refused:
            failure = failure or refused
            continue
        ttl = min(ttl, told.ttl) if not told.records else told.ttl
        if told.records:
            return source, _distinct(_target(record) for record in told.records), ttl
    raise failure or NotThere(cell, ttl)


def _target(record: Any) -> _Target:
    """Parses an SRV or AFSDB record. Its name is empty if the record names no server."""
    if record.rdtype == dns.rdatatype.SRV:
        return _Target(record.target.to_text(True), record.priority, record.weight, record.port)
    ours = record.subtype == _VOLUME_LOCATION
    return _Target(record.hostname.to_text(True) if ours else "", 0, 0, PORT)


def _distinct(targets: Iterable[_Target]) -> list[_Target]:
    """Removes duplicates and invalid names; keeps the name server's order."""
    first: dict[str, _Target] = {}
    for target in targets:
        if is_host(target.name):  # "." means that the service is not available (RFC 2782)
            first.setdefault(target.name.lower(), target)
    return list(first.values())[:MOST_SERVERS]


def _servers(
    names: Names, targets: list[_Target], ttl: int, families: tuple[int, ...]
) -> tuple[tuple[CellServer, ...], int]:
    """Returns the servers that have addresses, at least one, and their seconds to live. NotThere, Refused."""
    servers = []
    failure: Refused | None = None
    for target in targets:
        try:
            found = names.addresses(target.name, families, search=False)
        except Refused as refused:
            failure = failure or refused
        except NotThere as no:
            ttl = min(ttl, no.ttl)
        else:
            ttl = min(ttl, found.ttl)
            addresses = tuple(hosts.packed(address) for address in found.addresses)
            servers.append(CellServer(*target, addresses, found.source))
    if not servers:
        raise failure or NotThere("the servers of the cell", min(ttl, NEGATIVE_TTL))
    return tuple(servers), ttl


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
