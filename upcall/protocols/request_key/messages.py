"""What travels when the kernel wants a key (request_key(2)): from forwarder to broker, on to a daemon, and back.

Bodies of the messages in upcall/wire/envelope.py, in native byte order:

    Upcall    key i32, authorisation i32, len u16, len u16, described, callout    forwarder to broker
    Ask       len u16, len u16, description, callout                              broker to daemon
    Instance  expiry u32 (seconds, 0: none), payload                              the answer, all the way back

`described` is what KEYCTL_DESCRIBE says: "type;uid;gid;permissions;description".
Source: Documentation/security/keys/request-key.rst, keyctl(2), security/keys/request_key.c and keyctl.c.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from upcall.core.errors import PeerError

SERVICE = "request-key"  # what the forwarder asks the broker for
MAX_DESCRIPTION = 4095  # KEY_MAX_DESC_SIZE less the NUL; the callout's limit is a page less the NUL, too
MAX_CALLOUT = 4095
MAX_DESCRIBED = MAX_DESCRIPTION + 64  # the type (31 at most), uid, gid and permissions come before
MAX_PAYLOAD = 32767  # user_preparse() in security/keys/user_defined.c

_UPCALL = struct.Struct("=iiHH")
_ASK = struct.Struct("=HH")
_EXPIRY = struct.Struct("=I")
_DESCRIBED = re.compile(rb"([^;\0]{1,31});(\d{1,10});(-?\d{1,10});([0-9a-f]{8});([^\0]*)", re.DOTALL)


class Upcall(NamedTuple):
    """A key under construction, as the forwarder found it."""

    key: int
    authorisation: int  # serial of the key that allows to instantiate it
    described: bytes
    callout: bytes


class Described(NamedTuple):
    """What KEYCTL_DESCRIBE says of a key. `permissions`: 8 bits each for possessor, user, group and others."""

    type: str
    uid: int
    gid: int  # -1: none
    permissions: int
    description: bytes


class Ask(NamedTuple):
    """What a daemon is asked for; which type of key it is the service's name says."""

    description: bytes
    callout: bytes


class Instance(NamedTuple):
    """What the key is to hold, and for how many seconds (0: for good)."""

    expiry: int
    payload: bytes

    def __repr__(self) -> str:
        return f"Instance(expiry={self.expiry}, payload=<{len(self.payload)} bytes>)"


def pack_upcall(upcall: Upcall) -> bytes:
    key, authorisation, described, callout = upcall
    if len(described) > MAX_DESCRIBED or len(callout) > MAX_CALLOUT:
        raise PeerError("upcall", f"{len(described)} and {len(callout)} bytes are out of bounds")
    return _UPCALL.pack(key, authorisation, len(described), len(callout)) + described + callout


def take_upcall(body: bytes) -> Upcall:
    """An Upcall from exactly these bytes."""
    if len(body) < _UPCALL.size:
        raise PeerError("upcall", f"{len(body)} bytes, at least {_UPCALL.size} are needed")
    key, authorisation, size, rest = _UPCALL.unpack_from(body)
    if key <= 0 or authorisation <= 0:
        raise PeerError("upcall", f"keys {key} and {authorisation}: serial numbers are positive", 0)
    if size > MAX_DESCRIBED or rest > MAX_CALLOUT:
        raise PeerError("upcall", f"{size} and {rest} bytes are out of bounds", 8)
    described, callout = _two(body, _UPCALL.size, size, rest, "upcall")
    return Upcall(key, authorisation, described, callout)


def take_described(text: bytes) -> Described:
    """What KEYCTL_DESCRIBE says, without its NUL. A description may hold semicolons, nothing before it can."""
    found = _DESCRIBED.fullmatch(text)
    if found is None:
        raise PeerError("key", "it is not described as type;uid;gid;permissions;description")
    kind, uid, gid, permissions, description = found.groups()
    if len(description) > MAX_DESCRIPTION or not kind.isascii():
        raise PeerError("key", f"a description of {len(description)} bytes, at most {MAX_DESCRIPTION} are possible")
    return Described(kind.decode("ascii"), int(uid), int(gid), int(permissions, 16), description)


def pack_ask(ask: Ask) -> bytes:
    if len(ask.description) > MAX_DESCRIPTION or len(ask.callout) > MAX_CALLOUT:
        raise PeerError("key request", f"{len(ask.description)} and {len(ask.callout)} bytes are out of bounds")
    return _ASK.pack(len(ask.description), len(ask.callout)) + ask.description + ask.callout


def take_ask(body: bytes) -> Ask:
    """An Ask from exactly these bytes."""
    if len(body) < _ASK.size:
        raise PeerError("key request", f"{len(body)} bytes, at least {_ASK.size} are needed")
    size, rest = _ASK.unpack_from(body)
    if size > MAX_DESCRIPTION or rest > MAX_CALLOUT:
        raise PeerError("key request", f"{size} and {rest} bytes are out of bounds", 0)
    return Ask(*_two(body, _ASK.size, size, rest, "key request"))


def pack_instance(instance: Instance) -> bytes:
    if not 1 <= len(instance.payload) <= MAX_PAYLOAD or not 0 <= instance.expiry < 1 << 32:
        raise PeerError("key", f"a payload of {len(instance.payload)} bytes for {instance.expiry} s is out of bounds")
    return _EXPIRY.pack(instance.expiry) + instance.payload


def take_instance(body: bytes) -> Instance:
    """An Instance from exactly these bytes. What the payload means is its type's affair."""
    size = len(body) - _EXPIRY.size
    if not 1 <= size <= MAX_PAYLOAD:
        raise PeerError("key", f"a payload of {size} bytes, 1 to {MAX_PAYLOAD} are possible", _EXPIRY.size)
    return Instance(_EXPIRY.unpack_from(body)[0], body[_EXPIRY.size :])


def _two(body: bytes, start: int, first: int, second: int, what: str) -> tuple[bytes, bytes]:
    middle, end = start + first, start + first + second
    if end != len(body):
        raise PeerError(what, f"{len(body)} bytes, its lengths make {end}", start)
    return body[start:middle], body[middle:]
