"""Packs and parses the messages of request_key(2): forwarder to broker, broker to daemon, and the answers. Pure.

Bodies of the messages in upcall/wire/envelope.py, in native byte order:

    Upcall    key i32, authorisation i32, len u16, len u16, described, callout    forwarder to broker
    Ask       len u16, len u16, description, callout                              broker to daemon
    Instance  expiry u32 (seconds, 0: none), payload                              the answer, all the way back

`described` is the text of KEYCTL_DESCRIBE: "type;uid;gid;permissions;description".
Parsers raise PeerError on malformed bytes; packers raise it on values that are out of bounds.
Source: Documentation/security/keys/request-key.rst, keyctl(2), security/keys/request_key.c and keyctl.c.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from upcall.core.errors import PeerError

SERVICE = "request-key"  # the service name that the forwarder uses
MAX_DESCRIPTION = 4095  # KEY_MAX_DESC_SIZE less the NUL; the callout's limit is a page less the NUL, too
MAX_CALLOUT = 4095
MAX_DESCRIBED = MAX_DESCRIPTION + 64  # the type (31 at most), uid, gid and permissions come before
MAX_PAYLOAD = 32767  # user_preparse() in security/keys/user_defined.c

MAX_ID = 0xFFFFFFFE  # the kernel reserves (uid_t) -1: INVALID_UID

_UPCALL = struct.Struct("=iiHH")
_ASK = struct.Struct("=HH")
_EXPIRY = struct.Struct("=I")
_ID = re.compile(rb"0|[1-9][0-9]{0,9}")
_DESCRIBED = re.compile(rb"([^;\0]{1,31});(\d{1,10});(-?\d{1,10});([0-9a-f]{8});([^\0]*)", re.DOTALL)


class Upcall(NamedTuple):
    """A key under construction, as the forwarder reports it."""

    key: int  # its serial number
    authorisation: int  # serial number of the key that allows instantiating it
    described: bytes  # the text of KEYCTL_DESCRIBE, without NUL; at most MAX_DESCRIBED
    callout: bytes  # at most MAX_CALLOUT


class Described(NamedTuple):
    """A parsed KEYCTL_DESCRIBE. `permissions`: 8 bits each for possessor (highest), user, group and others."""

    type: str
    uid: int
    gid: int  # -1: none
    permissions: int
    description: bytes


class Ask(NamedTuple):
    """The body of a request to a daemon. The key's type is the service's name."""

    description: bytes  # at most MAX_DESCRIPTION
    callout: bytes  # at most MAX_CALLOUT


class Instance(NamedTuple):
    """The body of an answer: the key's payload."""

    expiry: int  # seconds until the kernel expires the key; 0: never
    payload: bytes  # 1 to MAX_PAYLOAD bytes, in the format of the key's type

    def __repr__(self) -> str:
        return f"Instance(expiry={self.expiry}, payload=<{len(self.payload)} bytes>)"


def pack_upcall(upcall: Upcall) -> bytes:
    """Returns the body of the forwarder's request. PeerError if `described` or `callout` is too long. Serial numbers
    are i32; struct.error if one does not fit."""
    key, authorisation, described, callout = upcall
    if len(described) > MAX_DESCRIBED or len(callout) > MAX_CALLOUT:
        raise PeerError("upcall", f"{len(described)} and {len(callout)} bytes are out of bounds")
    return _UPCALL.pack(key, authorisation, len(described), len(callout)) + described + callout


def take_upcall(body: bytes) -> Upcall:
    """Parses an Upcall that fills `body`. PeerError, also if a serial number is not positive."""
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
    """Parses the text of KEYCTL_DESCRIBE, without its NUL. Only the description may contain semicolons. PeerError if
    a field is malformed, or the description is longer than MAX_DESCRIPTION bytes."""
    found = _DESCRIBED.fullmatch(text)
    if found is None:
        raise PeerError("key", "it is not described as type;uid;gid;permissions;description")
    kind, uid, gid, permissions, description = found.groups()
    if len(description) > MAX_DESCRIPTION or not kind.isascii():
        raise PeerError("key", f"a description of {len(description)} bytes, at most {MAX_DESCRIPTION} are possible")
    return Described(kind.decode("ascii"), int(uid), int(gid), int(permissions, 16), description)


def pack_ask(ask: Ask) -> bytes:
    """Returns the body of a request to a daemon. PeerError if description or callout is too long."""
    if len(ask.description) > MAX_DESCRIPTION or len(ask.callout) > MAX_CALLOUT:
        raise PeerError("key request", f"{len(ask.description)} and {len(ask.callout)} bytes are out of bounds")
    return _ASK.pack(len(ask.description), len(ask.callout)) + ask.description + ask.callout


def take_ask(body: bytes) -> Ask:
    """Parses an Ask that fills `body`. PeerError if it is malformed."""
    if len(body) < _ASK.size:
        raise PeerError("key request", f"{len(body)} bytes, at least {_ASK.size} are needed")
    size, rest = _ASK.unpack_from(body)
    if size > MAX_DESCRIPTION or rest > MAX_CALLOUT:
        raise PeerError("key request", f"{size} and {rest} bytes are out of bounds", 0)
    return Ask(*_two(body, _ASK.size, size, rest, "key request"))


def pack_instance(instance: Instance) -> bytes:
    """Returns the body of an answer. PeerError if the payload is not 1 to MAX_PAYLOAD bytes long or `expiry` (seconds)
    is not an u32."""
    if not 1 <= len(instance.payload) <= MAX_PAYLOAD or not 0 <= instance.expiry < 1 << 32:
        raise PeerError("key", f"a payload of {len(instance.payload)} bytes for {instance.expiry} s is out of bounds")
    return _EXPIRY.pack(instance.expiry) + instance.payload


def take_instance(body: bytes) -> Instance:
    """Parses an Instance that fills `body`. PeerError if the payload is not 1 to MAX_PAYLOAD bytes long. Does not
    check the payload's format: see `KeyType.check_answer`."""
    size = len(body) - _EXPIRY.size
    if not 1 <= size <= MAX_PAYLOAD:
        raise PeerError("key", f"a payload of {size} bytes, 1 to {MAX_PAYLOAD} are possible", _EXPIRY.size)
    return Instance(_EXPIRY.unpack_from(body)[0], body[_EXPIRY.size :])


def take_plain_ask(kind: str, body: bytes) -> bytes:
    """Parses an Ask of a key type without callouts. Returns the description. PeerError if `body` is malformed or has a
    callout. `kind`: the key type, for the error."""
    ask = take_ask(body)
    if ask.callout:
        raise PeerError(kind, f"a callout of {len(ask.callout)} bytes, the kernel gives none")
    return ask.description


def take_limited(kind: str, body: bytes, most: int) -> Instance:
    """Parses an Instance of a key type whose keys must expire. PeerError if `body` is malformed or its expiry is not 1
    to `most` seconds. `kind`: the key type, for the error."""
    instance = take_instance(body)
    if not 1 <= instance.expiry <= most:
        raise PeerError(kind, f"an answer for {instance.expiry} s, 1 to {most} are right")
    return instance


def take_id(kind: str, text: bytes) -> int:
    """Parses a uid or gid, in decimal without leading zeros, as the kernel writes it. PeerError if it is not 0 to
    MAX_ID. `kind`: the key type, for the error."""
    if not _ID.fullmatch(text) or int(text) > MAX_ID:
        raise PeerError(kind, f"an id of {len(text)} bytes that is not 0 to {MAX_ID} in decimal")
    return int(text)


def _two(body: bytes, start: int, first: int, second: int, what: str) -> tuple[bytes, bytes]:
    """Splits `body` from `start` into fields of `first` and `second` bytes. PeerError unless they fill it."""
    middle, end = start + first, start + first + second
    if end != len(body):
        raise PeerError(what, f"{len(body)} bytes, its lengths make {end}", start)
    return body[start:middle], body[middle:]
