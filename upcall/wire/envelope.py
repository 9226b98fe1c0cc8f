"""Packs and parses the messages between broker, daemon and requesters: eCryptfs's netlink transport plus an envelope.

Specified in docs/protocol.md. All integers are in native byte order, as in netlink. Pure.

    nlmsghdr                 len u32, type u16, flags u16, seq u32, pid u32
    struct ecryptfs_message  index u32, data_len u32, data           REQUEST, RESPONSE and NOTICE
    data of REQUEST, NOTICE  version u8, name_len u8, flags u16, uid u32, pid u32, deadline_ns u64, name, body
    data of RESPONSE         version u8, status u8, errno u16, body (or, status not 0, the reason, or reason, NUL, why)

HELO and QUIT end after the nlmsghdr. Source of the first two: include/uapi/linux/netlink.h, and
fs/ecryptfs/netlink.c of Linux 2.6.27. On AF_UNIX the same bytes travel in SOCK_SEQPACKET datagrams.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import NamedTuple

from upcall.core.errors import REASONS, PeerError
from upcall.core.messages import Answer, Refusal, Requester

# nlmsg_type: the numbers of eCryptfs's own messages (ECRYPTFS_MSG_*), and one more.
HELO, QUIT, REQUEST, RESPONSE, NOTICE = 100, 101, 102, 103, 104

VERSION = 1
MAX_BODY = 65536
MAX_NAME = 64
MAX_REASON = 64
MAX_WHY = 200  # bytes of UTF-8
WANTS_WHY = 1  # a bit of the envelope's flags
STATUS_ANSWERED, STATUS_REFUSED = 0, 1

HEADER = struct.Struct("=IHHII")
MESSAGE = struct.Struct("=II")
REQUEST_HEAD = struct.Struct("=IHHII II BBHIIQ")  # nlmsghdr, ecryptfs_message, envelope
RESPONSE_HEAD = struct.Struct("=IHHII II BBH")

_BEFORE_DATA = HEADER.size + MESSAGE.size
_REQUEST_HEAD_SIZE, _RESPONSE_HEAD_SIZE = REQUEST_HEAD.size, RESPONSE_HEAD.size
_new = tuple.__new__  # a NamedTuple's own constructor is Python code, which takes as long again
MAX_MESSAGE = REQUEST_HEAD.size + MAX_NAME + MAX_BODY
_WITH_MESSAGE = frozenset({REQUEST, RESPONSE, NOTICE})


class NetlinkMessage(NamedTuple):
    """One netlink message. `data` is None for HELO and QUIT, which carry no struct ecryptfs_message."""

    type: int
    seq: int
    index: int = 0  # type: ignore[assignment]  # not tuple.index
    data: bytes | None = None
    flags: int = 0
    pid: int = 0


def pack_message(message: NetlinkMessage) -> bytes:
    """Returns the bytes of one message, nlmsghdr first. struct.error if a number exceeds its field."""
    if message.data is None:
        return HEADER.pack(HEADER.size, message.type, message.flags, message.seq, message.pid)
    size = len(message.data)
    return b"".join(
        (
            HEADER.pack(_BEFORE_DATA + size, message.type, message.flags, message.seq, message.pid),
            MESSAGE.pack(message.index, size),
            message.data,
        )
    )


def take_message(data: bytes) -> NetlinkMessage:
    """Parses one message that fills `data`. PeerError if it is malformed. The kernel validates nothing on AF_UNIX or
    between user-space netlink sockets, so all lengths are checked here."""
    if len(data) < HEADER.size:
        raise PeerError("netlink message", f"{len(data)} bytes, at least {HEADER.size} are needed")
    length, kind, flags, seq, pid = HEADER.unpack_from(data)
    if length != len(data):
        raise PeerError("netlink message", f"nlmsg_len {length}, {len(data)} bytes are there", 0)
    if kind not in _WITH_MESSAGE:
        if length != HEADER.size:
            raise PeerError("netlink message", f"type {kind} carries nothing", HEADER.size)
        return NetlinkMessage(kind, seq, 0, None, flags, pid)
    if length < _BEFORE_DATA:
        raise PeerError("netlink message", "ends before its struct ecryptfs_message", HEADER.size)
    index, size = MESSAGE.unpack_from(data, HEADER.size)
    if size != length - _BEFORE_DATA:
        raise PeerError(
            "netlink message", f"data_len {size}, {length - _BEFORE_DATA} bytes are there", HEADER.size + 4
        )
    return NetlinkMessage(kind, seq, index, data[_BEFORE_DATA:], flags, pid)


def pack_control(kind: int, seq: int = 0) -> bytes:
    """Returns the bytes of a HELO or QUIT."""
    return HEADER.pack(HEADER.size, kind, 0, seq, 0)


class Envelope(NamedTuple):
    """A REQUEST or NOTICE. `deadline_ns`: CLOCK_MONOTONIC in nanoseconds; 0: none. `body`: in the service's format.
    `wants_why`: a refusal may carry the daemon's `why`."""

    seq: int
    index: int  # type: ignore[assignment]  # not tuple.index
    service: str
    requester: Requester
    deadline_ns: int
    body: bytes
    wants_why: bool = False

    def __repr__(self) -> str:
        return (
            f"Envelope(seq={self.seq}, index={self.index}, service={self.service!r}, "
            f"requester={self.requester!r}, body=<{len(self.body)} bytes>)"
        )


def pack_request(envelope: Envelope, kind: int = REQUEST) -> bytes:
    """Returns the bytes of a REQUEST or NOTICE (`kind`). PeerError if the name is not 1 to MAX_NAME bytes long or the
    body is longer than MAX_BODY; UnicodeEncodeError if the name is not ASCII."""
    return pack_request_of(kind, *envelope)


def pack_request_of(
    kind: int, seq: int, index: int, service: str, requester: Requester, deadline_ns: int, body: bytes, wants_why: bool
) -> bytes:
    """As `pack_request`, of the envelope's fields."""
    uid, pid = requester
    name = service.encode("ascii")
    if not 1 <= len(name) <= MAX_NAME or len(body) > MAX_BODY:
        raise PeerError("request", f"a name of {len(name)} and a body of {len(body)} bytes are out of bounds")
    size = REQUEST_HEAD.size + len(name) + len(body)
    head = REQUEST_HEAD.pack(
        size, kind, 0, seq, 0, index, size - _BEFORE_DATA, VERSION, len(name), wants_why, uid, pid, deadline_ns
    )
    return b"".join((head, name, body))


def take_request(data: bytes, kinds: Collection[int] = (REQUEST, NOTICE)) -> Envelope:
    """Parses a REQUEST or NOTICE (or another of `kinds` with an envelope) that fills `data`. PeerError if it is
    malformed."""
    there = len(data)
    if there < _REQUEST_HEAD_SIZE:
        raise PeerError("request", f"{there} bytes, at least {_REQUEST_HEAD_SIZE} are needed")
    length, kind, _, seq, _, index, size, version, name_len, flags, uid, pid, deadline_ns = REQUEST_HEAD.unpack_from(
        data
    )
    if kind not in kinds or length != there or size != length - _BEFORE_DATA:
        raise PeerError("request", f"type {kind}, nlmsg_len {length} and data_len {size} do not fit", 0)
    if version != VERSION:
        raise PeerError("request", f"version {version}, {VERSION} is known", _BEFORE_DATA)
    at = _REQUEST_HEAD_SIZE + name_len
    if not 1 <= name_len <= MAX_NAME or at > length or length - at > MAX_BODY:
        raise PeerError("request", f"name_len {name_len} does not fit", _BEFORE_DATA + 1)
    try:
        service = data[_REQUEST_HEAD_SIZE:at].decode("ascii")
    except UnicodeDecodeError:
        raise PeerError("request", "the service's name is not ASCII", _REQUEST_HEAD_SIZE) from None
    requester = _new(Requester, (uid, pid))
    return _new(Envelope, (seq, index, service, requester, deadline_ns, data[at:], flags & WANTS_WHY == WANTS_WHY))


def pack_answer(seq: int, index: int, body: bytes) -> bytes:
    """Returns the bytes of a RESPONSE that grants a request. PeerError if the body is longer than MAX_BODY."""
    size = _RESPONSE_HEAD_SIZE + len(body)
    if size > _RESPONSE_HEAD_SIZE + MAX_BODY:
        raise PeerError("response", f"a body of {len(body)} bytes, at most {MAX_BODY} are allowed")
    return (
        RESPONSE_HEAD.pack(size, RESPONSE, 0, seq, 0, index, size - _BEFORE_DATA, VERSION, STATUS_ANSWERED, 0) + body
    )


def pack_response(seq: int, index: int, outcome: Answer | Refusal) -> bytes:
    """Returns the bytes of a RESPONSE. PeerError if an answer's body is longer than MAX_BODY. A refusal's reason is
    made printable ASCII and cut at MAX_REASON bytes; its `why` is made printable and cut at MAX_WHY bytes."""
    if isinstance(outcome, Answer):
        return pack_answer(seq, index, outcome.body)
    body = _printable(outcome.reason).encode("ascii", "replace")[:MAX_REASON]
    if outcome.why:
        why = _printable(outcome.why).encode("utf-8")[:MAX_WHY].decode("utf-8", "ignore")
        body += b"\0" + why.encode("utf-8")
    size, code = RESPONSE_HEAD.size + len(body), outcome.errno & 0xFFFF
    head = RESPONSE_HEAD.pack(size, RESPONSE, 0, seq, 0, index, size - _BEFORE_DATA, VERSION, STATUS_REFUSED, code)
    return head + body


def _printable(text: str) -> str:
    """Replaces what is not printable: control characters, and those that change the direction of text or show
    nothing (str.isprintable: Unicode's categories C and Z, except the space)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


class Response(NamedTuple):
    """A RESPONSE. `seq` and `index` are those of the REQUEST."""

    seq: int
    index: int  # type: ignore[assignment]  # not tuple.index
    outcome: Answer | Refusal


def response_position(data: bytes) -> tuple[int, int]:
    """Returns (seq, index) of a RESPONSE without checking the rest, so that a malformed one can still be matched to
    its request. PeerError if `data` is too short."""
    if len(data) < _BEFORE_DATA:
        raise PeerError("response", f"{len(data)} bytes, at least {_BEFORE_DATA} are needed")
    _, _, _, seq, _, index, _ = struct.unpack_from("=IHHII II", data)
    return seq, index


def take_response(data: bytes) -> Response:
    """Parses a RESPONSE that fills `data`. PeerError if it is malformed. An unknown reason is kept."""
    head = response_head(data)
    outcome = take_outcome(head, data)
    return Response(head[3], head[5], outcome)


def response_head(data: bytes) -> tuple[int, ...]:
    """Returns the numbers before the body of a RESPONSE, unchecked, for `take_outcome`; seq is [3], index is [5].
    Empty if `data` is too short."""
    return RESPONSE_HEAD.unpack_from(data) if len(data) >= _RESPONSE_HEAD_SIZE else ()


def take_outcome(head: tuple[int, ...], data: bytes) -> Answer | Refusal:
    """Parses a RESPONSE that fills `data`, of which `head` is the response_head. PeerError if it is malformed."""
    if not head:
        raise PeerError("response", f"{len(data)} bytes, at least {_RESPONSE_HEAD_SIZE} are needed")
    length, kind, _, _, _, _, size, version, status, code = head
    if kind != RESPONSE or length != len(data) or size != length - _BEFORE_DATA:
        raise PeerError("response", f"type {kind}, nlmsg_len {length} and data_len {size} do not fit", 0)
    if version != VERSION:
        raise PeerError("response", f"version {version}, {VERSION} is known", _BEFORE_DATA)
    body = data[_RESPONSE_HEAD_SIZE:]
    if status == STATUS_ANSWERED:
        if len(body) > MAX_BODY:
            raise PeerError("response", f"a body of {len(body)} bytes", RESPONSE_HEAD.size)
        return _new(Answer, (body,))
    body, has_why, why = body.partition(b"\0")
    if len(body) > MAX_REASON or not body.isascii() or not body.decode("ascii").isprintable():
        raise PeerError("response", "the reason is not a short printable text", RESPONSE_HEAD.size)
    text = _take_why(why, RESPONSE_HEAD.size + len(body) + 1) if has_why else ""
    return Refusal(body.decode("ascii"), code, text)


def _take_why(data: bytes, where: int) -> str:
    """Returns a refusal's `why`. It is shown in terminals: PeerError unless it is a short printable text."""
    if not 1 <= len(data) <= MAX_WHY:
        raise PeerError("response", f"a why of {len(data)} bytes, 1 to {MAX_WHY} are allowed", where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise PeerError("response", "the why is not UTF-8", where) from None
    if not text.isprintable():
        raise PeerError("response", "the why is not printable", where)
    return text


def refusal(reason: str, code: int | None = None, why: str = "") -> Refusal:
    """Returns a Refusal with `code`, by default the errno of its reason. KeyError if the reason is not in REASONS."""
    return Refusal(reason, REASONS[reason] if code is None else code, why)


__all__ = [
    "HELO",
    "NOTICE",
    "QUIT",
    "REQUEST",
    "RESPONSE",
    "Envelope",
    "NetlinkMessage",
    "Response",
    "pack_answer",
    "pack_control",
    "pack_message",
    "pack_request",
    "pack_request_of",
    "pack_response",
    "refusal",
    "response_head",
    "response_position",
    "take_message",
    "take_outcome",
    "take_request",
    "take_response",
]
