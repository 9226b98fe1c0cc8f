"""Sorts addresses by preference: RFC 6724, with the tables of glibc's getaddrinfo, which are those of RFC 3484.

Rules 3, 4 and 7 (deprecated and home addresses, tunnels) and /etc/gai.conf are not implemented.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Table = tuple[tuple[ipaddress.IPv6Network, int], ...]

_RTM_NEWADDR, _RTM_GETADDR, _IFA_LOCAL = 20, 22, 2
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_PATIENCE = 1.0  # seconds; the kernel answers at once


_LABELS: _Table = tuple(
    (ipaddress.IPv6Network(prefix), label)
    for prefix, label in (
        ("::1/128", 0),
        ("2002::/16", 2),
        ("::/96", 3),
        ("::ffff:0:0/96", 4),
        ("fec0::/10", 5),
        ("fc00::/7", 6),
        ("2001::/32", 7),
        ("::/0", 1),
    )
)
_PRECEDENCES: _Table = tuple(
    (ipaddress.IPv6Network(prefix), precedence)
    for prefix, precedence in (("::1/128", 50), ("2002::/16", 30), ("::/96", 20), ("::ffff:0:0/96", 10), ("::/0", 40))
)


def ordered(addresses: Sequence[str]) -> list[str]:
    """Returns the addresses, the best first. The sort is stable."""
    if len(addresses) < 2:
        return list(addresses)
    return sorted(addresses, key=_rank)


def _rank(text: str) -> tuple[int, ...]:
    """Returns the sort key; smaller is better. Its items are those of rules 1, 2, 5, 6, 8, 9."""
    destination = ipaddress.ip_address(text)
    source = _source(destination)
    scope, precedence = _scope(destination), _in(_PRECEDENCES, destination)
    if source is None:
        return (1, 0, 0, -precedence, scope, 0)
    other_scope = scope != _scope(source)
    other_label = _in(_LABELS, destination) != _in(_LABELS, source)
    return (0, other_scope, other_label, -precedence, scope, -_common(destination, source))


def _source(destination: _Address) -> _Address | None:
    """Returns the local address from which the kernel would send; None without a route. Sends nothing."""
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(destination), 53))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None


def _scope(address: _Address) -> int:
    """Returns the scope: 2 for link or host, 5 for site, 14 for global."""
    if address.is_link_local or address.is_loopback:
        return 2
    return 5 if isinstance(address, ipaddress.IPv6Address) and address.is_site_local else 14


def _in(table: _Table, address: _Address) -> int:
    if isinstance(address, ipaddress.IPv4Address):
        address = ipaddress.IPv6Address(f"::ffff:{address}")
    return next(value for network, value in table if address in network)


def _common(one: _Address, other: _Address) -> int:
    """Returns the length of the common prefix in bits. 0 for IPv4 addresses in different subnets."""
    if isinstance(other, ipaddress.IPv4Address):
        mask = _netmask(other)
        if int(one) & mask != int(other) & mask:
            return 0
    return one.max_prefixlen - (int(one) ^ int(other)).bit_length()


def _netmask(address: ipaddress.IPv4Address) -> int:
    """Returns the netmask of one of this machine's addresses as a number, from rtnetlink(7)."""
    for family, prefix, attributes in _own_addresses():
        if family == socket.AF_INET and address.packed in attributes:
            return 0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF
    return 0xFFFFFFFF


def _own_addresses() -> Iterator[tuple[int, int, list[bytes]]]:
    """Yields (family, prefix length, values of IFA_LOCAL) of each address of this machine."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
        asking.settimeout(_PATIENCE)
        asking.send(struct.pack("=IHHIIB3x", 20, _RTM_GETADDR, _DUMP, 1, 0, socket.AF_INET))
        while True:
            data, at = asking.recv(1 << 16), 0
            while at < len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                if kind != _RTM_NEWADDR:
                    return  # NLMSG_DONE, or an error
                family, prefix = data[at + 16], data[at + 17]
                yield family, prefix, list(_values(data, at + 24, at + size, _IFA_LOCAL))
                at += (size + 3) & ~3


def _values(data: bytes, at: int, end: int, wanted: int) -> Iterator[bytes]:
    while at < end:
        size, kind = struct.unpack_from("=HH", data, at)
        if kind == wanted:
            yield data[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)
