"""Fuzzes messages of the forwarder, the kernel's descriptions of keys, and origin_check: any user can make
descriptions.

Raises only PeerError, and Refused by origin_check. Each message encodes back to the same bytes.
"""

from __future__ import annotations

from fuzz.target import same, taken
from upcall.core.errors import Refused
from upcall.protocols.request_key import messages as wire
from upcall.protocols.request_key import origin_check as gate

_DESCRIBED = (
    b"cifs.spnego;0;0;3f010000;ver=0x2;host=a.test;ip4=192.0.2.1;sec=krb5;uid=0x0;creduid=0x3e8;user=ada;pid=0x7"
)
SEEDS = [
    wire.pack_upcall(wire.Upcall(0x10, 0x20, _DESCRIBED, b"x")),
    wire.pack_upcall(wire.Upcall(0x10, 0x20, b"dns_resolver;0;0;3f010000;a:host.test", b"list")),
    wire.pack_ask(wire.Ask(b"host.test", b"ipv6")),
    wire.pack_instance(wire.Instance(300, b"192.0.2.1\0")),
    _DESCRIBED,
    b".request_key_auth;0;0;0b010000;10",
]


def run(data: bytes) -> None:
    upcall, ask, instance = (taken(take, data) for take in (wire.take_upcall, wire.take_ask, wire.take_instance))
    if isinstance(upcall, wire.Upcall):
        same(wire.pack_upcall(upcall), data)
        _gate(taken(wire.take_described, upcall.described), upcall)
    if isinstance(ask, wire.Ask):
        same(wire.pack_ask(ask), data)
    if isinstance(instance, wire.Instance):
        same(wire.pack_instance(instance), data)
    _gate(taken(wire.take_described, data))


def _gate(key: wire.Described | None, upcall: wire.Upcall | None = None) -> None:
    if key is None:
        return
    upcall = upcall or wire.Upcall(16, 32, b"", b"")
    authorisation = wire.Described(gate.AUTHORISATION, 0, 0, 0, b"%x" % upcall.key)
    try:
        gate.check_key(upcall, key, authorisation)
        wanted = gate.wanted(key)
    except Refused:
        return
    same(key.uid, 0)
    same(0 <= wanted.uid < 0xFFFFFFFF, True)
