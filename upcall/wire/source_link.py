"""Packs and parses the messages between the broker and a source in a process of its own, over source.sock.

A source sends requests and notices to daemons, and learns which uids have one. Specified in docs/protocol.md.

    STATUS        source to broker   an envelope; its service is the source's name, its body a JSON object
    REQUEST       source to broker   an envelope whose body is `target u32` (whose daemon is asked), then the service's
    NOTICE        source to broker   the same, without an answer of the daemon
    RESPONSE      broker to source   the outcome of the REQUEST or NOTICE with this seq and index
    REGISTERED    broker to source   struct ecryptfs_message: `uid u32` of each uid that has a daemon now;
                                     index 1: the whole list, which replaces earlier ones; index 0: additional uids
    UNREGISTERED  broker to source   the same, of uids that have none any more; index 0

uid and pid of a REQUEST's or NOTICE's envelope: the process that caused it. Uid 0 as a target, and in REGISTERED, is
the machine's daemon for notices and for services of the network. Native byte order; one datagram is one message. Pure.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.core.messages import Requester
from upcall.wire.envelope import (
    HEADER,
    MAX_BODY,
    MESSAGE,
    NOTICE,
    REQUEST,
    RESPONSE,
    Envelope,
    Response,
    pack_request,
    take_request,
    take_response,
)

REGISTERED, UNREGISTERED, STATUS = 105, 106, 107
CHANGE, WHOLE = 0, 1  # values of `index` in REGISTERED
MOST_UIDS: Final = 4096  # in one message
MAX_STATUS: Final = 8192  # bytes, because it is part of the broker's own status
MAX_TARGETED: Final = MAX_BODY - 4  # bytes of a service's body after the target

_TARGET = struct.Struct("=I")
_TYPE = struct.Struct("=4xH")
_BEFORE_UIDS = HEADER.size + MESSAGE.size
_WHAT = "source message"


class FromSource(NamedTuple):
    """A STATUS (target 0), REQUEST or NOTICE; `envelope.body` is without the target."""

    kind: int
    target: int
    envelope: Envelope


class Registrations(NamedTuple):
    """A REGISTERED or UNREGISTERED (`kind`). `whole`: no other uids are registered."""

    kind: int
    uids: tuple[int, ...]
    whole: bool = False


def type_of(data: bytes) -> int:
    """Returns nlmsg_type; -1 if `data` is too short."""
    return int(_TYPE.unpack_from(data)[0]) if len(data) >= HEADER.size else -1


# --- source to broker ------------------------------------------------------------------------------------------


def pack_from_source(message: FromSource) -> bytes:
    """Returns the bytes of a STATUS, REQUEST or NOTICE. PeerError if the name or body is too long."""
    kind, target, envelope = message
    if kind != STATUS:
        envelope = envelope._replace(body=_TARGET.pack(target) + envelope.body)
    return pack_request(envelope, kind)


def take_from_source(data: bytes) -> FromSource:
    """Parses a source's message that fills `data`. PeerError if it is malformed."""
    kind = type_of(data)
    envelope = take_request(data, (REQUEST, NOTICE, STATUS))
    if kind == STATUS:
        if len(envelope.body) > MAX_STATUS:
            raise PeerError(_WHAT, f"a status of {len(envelope.body)} bytes, at most {MAX_STATUS} are allowed")
        return FromSource(kind, 0, envelope)
    if len(envelope.body) < _TARGET.size:
        raise PeerError(_WHAT, "ends before its target")
    (target,) = _TARGET.unpack_from(envelope.body)
    return FromSource(kind, target, envelope._replace(body=envelope.body[_TARGET.size :]))


def pack_status(name: str, seq: int, status: Mapping[str, object]) -> bytes:
    """Returns the bytes of a STATUS. `name`: the source's. PeerError if the JSON is longer than MAX_STATUS."""
    body = json.dumps(status, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_STATUS:
        raise PeerError(_WHAT, f"a status of {len(body)} bytes, at most {MAX_STATUS} are allowed")
    return pack_from_source(FromSource(STATUS, 0, Envelope(seq, 0, name, Requester(0, 0), 0, body)))


def take_status(body: bytes) -> dict[str, Any]:
    """Parses the body of a STATUS. PeerError unless it is a JSON object."""
    try:
        found = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise PeerError(_WHAT, "the status is not JSON") from None
    if not isinstance(found, dict):
        raise PeerError(_WHAT, "the status is not a JSON object")
    return found


def _refuse(what: str) -> None:
    raise ValueError(what)


# --- broker to source ------------------------------------------------------------------------------------------


def pack_registrations(kind: int, uids: Iterable[int], whole: bool = False) -> Iterator[bytes]:
    """Yields messages with at most MOST_UIDS uids each; at least one if `whole`."""
    left, index = tuple(uids), WHOLE if whole else CHANGE
    while left or index == WHOLE:
        these, left = left[:MOST_UIDS], left[MOST_UIDS:]
        size = _TARGET.size * len(these)
        head = HEADER.pack(_BEFORE_UIDS + size, kind, 0, 0, 0) + MESSAGE.pack(index, size)
        yield head + struct.pack(f"={len(these)}I", *these)
        index = CHANGE


def take_to_source(data: bytes) -> Response | Registrations:
    """Parses a message of the broker's that fills `data`. PeerError if it is malformed."""
    kind = type_of(data)
    if kind == RESPONSE:
        return take_response(data)
    if kind not in (REGISTERED, UNREGISTERED):
        raise PeerError(_WHAT, f"type {kind} is not the broker's")
    if len(data) < _BEFORE_UIDS:
        raise PeerError(_WHAT, f"{len(data)} bytes, at least {_BEFORE_UIDS} are needed")
    (length, *_), (index, size) = HEADER.unpack_from(data), MESSAGE.unpack_from(data, HEADER.size)
    if length != len(data) or size != length - _BEFORE_UIDS or size % _TARGET.size:
        raise PeerError(_WHAT, f"nlmsg_len {length} and data_len {size} do not fit", 0)
    if size > _TARGET.size * MOST_UIDS:
        raise PeerError(_WHAT, f"{size // _TARGET.size} uids, at most {MOST_UIDS} are allowed", HEADER.size)
    if index not in (CHANGE, WHOLE) or (index == WHOLE and kind == UNREGISTERED):
        raise PeerError(_WHAT, f"index {index}", HEADER.size)
    uids = struct.unpack_from(f"={size // _TARGET.size}I", data, _BEFORE_UIDS)
    return Registrations(kind, uids, index == WHOLE)
