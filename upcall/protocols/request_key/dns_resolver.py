"""Parses descriptions of "dns_resolver" keys, requested by CIFS, NFS, Ceph and AFS, and packs their payloads.

    description  "NAME" or "TYPE:NAME"; TYPE is a, aaaa or afsdb
    callout      options with blanks between: ipv4, ipv6, list, srv=1; none: one IPv4 address (of servers: all)
    payload      "ADDRESS[+PORT],..." and NUL; "#dnserror=ERRNO" and NUL for a negative answer; or, with srv=1, a
                 server list:
                 zero, content 0, version 1, source, status, servers (u8 each), and for each server
                 length of name, priority, weight, port (u16 each, little-endian),
                 source, status, protocol, addresses (u8 each), name, and for each address its type (u8) and its bytes

CIFS, NFS and Ceph request "NAME" without options, AFS "afsdb:CELL" with "srv=1". Pure.
Source: Documentation/networking/dns_resolver.rst, net/dns_resolver/dns_key.c and dns_query.c,
include/uapi/linux/dns_resolver.h; key.dns_resolver(8).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.key_type import KeyType, Option, of_the_system
from upcall.protocols.request_key.messages import take_ask, take_limited

TYPE: Final = "dns_resolver"
IPV4, IPV6 = 4, 6
_KINDS = ("a", "aaaa", "afsdb")
MAX_HOST = 253  # without a dot at the end
MAX_NAME = 255  # of a server
MAX_TEXT = 4095
MAX_ERROR = 511
MAX_EXPIRY = 86400  # seconds

# enum dns_record_source
FROM_DNS_A, FROM_DNS_AFSDB, FROM_DNS_SRV, FROM_NSS, _SOURCES = 2, 3, 4, 5, 6
# enum dns_lookup_status
GOOD, GOOD_WITH_BAD, _STATUSES = 1, 2, 8
# enum dns_payload_protocol_type
UDP, _PROTOCOLS = 1, 3

_HEAD = struct.Struct("<6B")
_SERVER = struct.Struct("<4H4B")
_SIZES = {0: 4, 1: 16}  # enum dns_payload_address_type: bytes of an address
_TYPES = {size: kind for kind, size in _SIZES.items()}

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# The last label must not be a number: rejects incomplete IPv4 addresses.
_HOST = re.compile(rf"(?:{_LABEL}\.)*(?!\d+\.?\Z){_LABEL}\.?")
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!\Z)|\Z)){4}")
_IPV6 = re.compile(r"(?=.*:.*:)[0-9A-Fa-f:.]{2,45}")  # candidates only: inet_pton(3) decides
_OPTION = re.compile(r"[a-z0-9_-]+(?:=[!-+.-~-]*)?")
_ERROR = re.compile(rb"dnserror=([1-9][0-9]{0,2})")
_ITEMS = re.compile(rb"[!-+\--~]+(?:,[!-+\--~]+)*")  # graphic, and no comma
_ANSWER = re.compile(r"([0-9A-Fa-f:.]+)(\+[0-9]{1,5})?")


class Query(NamedTuple):
    """A parsed description. `kind`: "a", "aaaa", "afsdb", or "" without a type. `name`: of a host or cell, or an
    address."""

    kind: str
    name: str

    @property
    def literal(self) -> int:
        """IPV4 or IPV6 if the name looks like an address, otherwise 0."""
        return IPV4 if _IPV4.fullmatch(self.name) else IPV6 if _IPV6.fullmatch(self.name) else 0


class Options(NamedTuple):
    """A parsed callout."""

    families: tuple[int, ...]  # IPV4, IPV6 or both
    several: bool  # True: all addresses; False: the best one
    servers: bool  # the requester can parse a server list


class Text(NamedTuple):
    """A payload of addresses, those of servers with "+PORT". If `error` (an errno) is not 0, the kernel ignores
    `items`."""

    items: tuple[str, ...]
    error: int = 0


class CellServer(NamedTuple):
    """One server of a cell. Addresses have 4 or 16 bytes, in network byte order."""

    name: str
    priority: int
    weight: int
    port: int
    addresses: tuple[bytes, ...]
    source: int = FROM_DNS_A  # enum dns_record_source, of the addresses
    status: int = GOOD
    protocol: int = UDP


class ServerList(NamedTuple):
    """A payload of servers (struct dns_server_list_v1_header), for requests with srv=1."""

    source: int
    status: int
    servers: tuple[CellServer, ...]


def is_host(name: str) -> bool:
    """Returns whether this is a valid host name. ASCII only: requesters must encode IDNA themselves."""
    return _HOST.fullmatch(name) is not None and len(name.rstrip(".")) <= MAX_HOST


def take_description(text: bytes) -> Query:
    """Parses a description. PeerError if its type is unknown or its name is not a valid host name or address."""
    try:
        whole = text.decode("ascii")
    except UnicodeDecodeError as error:
        raise PeerError(TYPE, "the name is not ASCII", error.start) from None
    kind, colon, name = whole.partition(":")
    if colon and kind not in _KINDS and not Query("", whole).literal:
        raise PeerError(TYPE, f"the type is not one of {', '.join(_KINDS)}", 0)
    if not colon or kind not in _KINDS:  # an IPv6 address has colons of its own
        kind, name = "", whole
    query = Query(kind, name)
    if not is_host(name) and (not query.literal or kind == "afsdb"):
        raise PeerError(TYPE, f"a name of {len(name)} bytes that no host can have", len(whole) - len(name))
    return query


def take_callout(text: bytes, query: Query) -> Options:
    """Parses the callout of a query. Unknown options are ignored, as by key.dns_resolver(8). PeerError if an option is
    malformed."""
    several, servers = query.kind == "afsdb", False
    families: tuple[int, ...] = (IPV4, IPV6) if text or several else (IPV4,)  # as it was before there were options
    at = 0
    for word in text.split(b" "):
        option = word.decode("ascii", "replace")
        if option and not _OPTION.fullmatch(option):
            raise PeerError(TYPE, "the options are not NAME or NAME=VALUE with blanks between", at)
        if option in ("ipv4", "ipv6"):
            families = (IPV4,) if option == "ipv4" else (IPV6,)
        several |= option == "list"
        servers |= option == "srv=1"
        at += len(word) + 1
    return Options(families, several, servers)


def pack_text(text: Text) -> bytes:
    """Returns a payload of addresses or an error. PeerError if it is out of bounds (see `take_payload`)."""
    items = ",".join(text.items).encode("ascii")
    payload = items + (b"#dnserror=%d\0" % text.error if text.error else b"\0")
    check_payload(payload)
    return payload


def pack_servers(found: ServerList) -> bytes:
    """Returns a payload of servers, in the order given: the kernel sorts them by priority. PeerError or struct.error
    if a field is out of bounds."""
    parts = [_HEAD.pack(0, 0, 1, found.source, found.status, len(found.servers))]
    for server in found.servers:
        name, count = server.name.encode("ascii"), len(server.addresses)
        numbers = (server.priority, server.weight, server.port, server.source, server.status, server.protocol)
        parts += [_SERVER.pack(len(name), *numbers, count), name]
        parts += [bytes([_TYPES[len(address)]]) + address for address in server.addresses]
    payload = b"".join(parts)
    check_payload(payload)
    return payload


def take_payload(payload: bytes) -> Text | ServerList:
    """Parses a payload. PeerError if it is malformed; it names the offset."""
    return _take_servers(payload) if payload[:1] == b"\0" else _take_text(payload)


def check_payload(payload: bytes) -> None:
    """PeerError as `take_payload`."""
    take_payload(payload)


def check_request(body: bytes) -> None:
    """Checks the body of an Ask. PeerError if its description or callout is malformed."""
    ask = take_ask(body)
    take_callout(ask.callout, take_description(ask.description))


def check_answer(asked: bytes, answer: bytes) -> None:
    """Checks the body of an Instance. `asked`: that of the Ask. PeerError unless the key expires within MAX_EXPIRY
    seconds, and the payload has the form that was requested: families, number of addresses, server list."""
    ask = take_ask(asked)
    query = take_description(ask.description)
    options = take_callout(ask.callout, query)
    instance = take_limited(TYPE, answer, MAX_EXPIRY)
    found = take_payload(instance.payload)
    cell = query.kind == "afsdb"
    if isinstance(found, ServerList):
        if not (cell and options.servers):
            raise PeerError(TYPE, "a server list, which was not requested")
        return
    if not options.several and len(found.items) > 1:
        raise PeerError(TYPE, f"{len(found.items)} addresses, one was asked for")
    for item in found.items:
        _check_item(item, options.families, cell)


def _check_item(item: str, families: tuple[int, ...], cell: bool) -> None:
    found = _ANSWER.fullmatch(item)
    if found is None or (found[2] and not cell) or (Query("", found[1]).literal not in families):
        raise PeerError(TYPE, "an item that is no address of the kind that was asked for")


def _take_text(payload: bytes) -> Text:
    if not 2 <= len(payload) <= MAX_TEXT + 1:
        raise PeerError(TYPE, f"a text of {len(payload)} bytes, 2 to {MAX_TEXT + 1} are right")
    if payload[-1]:
        raise PeerError(TYPE, "a text without a NUL at its end", len(payload) - 1)
    items, mark, option = payload[:-1].partition(b"#")
    if items and not _ITEMS.fullmatch(items):
        raise PeerError(TYPE, "items that are empty or not graphic", 0)
    error = 0
    if mark:
        found = _ERROR.fullmatch(option)
        error = int(found[1]) if found else 0
        if not 1 <= error <= MAX_ERROR:
            raise PeerError(TYPE, f"an option that is not dnserror=1 to {MAX_ERROR}", len(items) + 1)
    return Text(tuple(items.decode("ascii").split(",")) if items else (), error)


def _take_servers(payload: bytes) -> ServerList:
    if len(payload) < _HEAD.size:
        raise PeerError(TYPE, f"a server list of {len(payload)} bytes, at least {_HEAD.size} are needed")
    _, content, version, source, status, count = _HEAD.unpack_from(payload)
    if (content, version) != (0, 1) or source >= _SOURCES or status >= _STATUSES:
        raise PeerError(TYPE, f"content {content}, version {version}, source {source} or status {status}", 1)
    servers, at = [], _HEAD.size
    for _ in range(count):
        server, at = _take_server(payload, at)
        servers.append(server)
    if at != len(payload):
        raise PeerError(TYPE, f"a server list of {len(payload)} bytes, its lengths make {at}", at)
    return ServerList(source, status, tuple(servers))


def _take_server(payload: bytes, at: int) -> tuple[CellServer, int]:
    """Parses the server at offset `at`. Returns it and the offset behind it."""
    head = _span(payload, at, _SERVER.size)
    size, priority, weight, port, source, status, protocol, count = _SERVER.unpack(head)
    if source >= _SOURCES or status >= _STATUSES or protocol >= _PROTOCOLS:
        raise PeerError(TYPE, f"source {source}, status {status} or protocol {protocol} of a server", at + 8)
    at += _SERVER.size
    name = _span(payload, at, size)
    if not 1 <= size <= MAX_NAME or not all(0x20 < byte < 0x7F for byte in name):
        raise PeerError(TYPE, f"a server's name of {size} bytes that is not 1 to {MAX_NAME} graphic ones", at)
    at += size
    addresses = []
    for _ in range(count):
        (kind,) = _span(payload, at, 1)
        if kind not in _SIZES:
            raise PeerError(TYPE, f"an address of type {kind}", at)
        addresses.append(_span(payload, at + 1, _SIZES[kind]))
        at += 1 + _SIZES[kind]
    return CellServer(name.decode("ascii"), priority, weight, port, tuple(addresses), source, status, protocol), at


def _span(payload: bytes, at: int, size: int) -> bytes:
    found = payload[at : at + size]
    if len(found) != size:
        raise PeerError(TYPE, f"a server list that ends {size - len(found)} bytes too early", at)
    return found


# --- the type ------------------------------------------------------------------------------------------------


def described(told: Mapping[str, str]) -> RequestedKey:
    """Builds the request for a host name or "afsdb:CELL". "options": the callout, with blanks between. PeerError."""
    name, options = told["name"].encode(), told.get("options", "").encode()
    take_callout(options, take_description(name))
    return RequestedKey(TYPE.encode(), name, options)


KEY_TYPE = KeyType(
    TYPE,
    "Names that the kernel's CIFS, NFS, AFS and Ceph look up.",
    of_the_system(take_description),
    check_request,
    check_answer,
    patience=6.0,  # mounts and reconnections block meanwhile; resolvers, too, time out after some seconds
    # Names share no prefix, so the pattern is no narrower than the distribution's. Of equally wild lines the first one
    # read applies, and request-key.conf is read last.
    patterns=(b"*",),
    typical=(RequestedKey(b"dns_resolver", b"any.invalid"),),
    options=(
        Option("name", "NAME", "what to look up.", required=True),
        Option("options", "TEXT", "what the kernel asks for, such as ipv6."),
    ),
    described=described,
    kernel=("the kernel can ask for names", "dns_resolver", "CONFIG_DNS_RESOLVER"),
    package="upcall-dns",
    of_the_system=True,
)
