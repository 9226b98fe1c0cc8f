"""Parses the kernel's quota warnings: generic netlink, family VFS_DQUOT, group "events", command QUOTA_NL_C_WARNING.

    nlmsghdr    len u32, type u16 (the family's number), flags u16, seq u32 (one counter for all warnings), pid u32
    genlmsghdr  command u8, version u8, reserved u16
    attributes  len u16, type u16, value, padded to 4 bytes:
                QTYPE u32, EXCESS_ID u64, WARNING u32, DEV_MAJOR u32, DEV_MINOR u32, CAUSED_ID u64

Native byte order. A warning contains no path, limit or usage: these are read with quotactl(2). Source:
include/uapi/linux/quota.h, fs/quota/netlink.c of Linux 6.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.quota.notice import BELOW, FILES, OVER_HARD, OVER_SOFT, OVER_SOFT_LONG, SPACE

FAMILY: Final = "VFS_DQUOT"
GROUP: Final = "events"
COMMAND: Final = 1  # QUOTA_NL_C_WARNING

QTYPE, EXCESS_ID, WARNING, DEV_MAJOR, DEV_MINOR, CAUSED_ID = range(1, 7)  # attributes
USER, GROUP_QUOTA, PROJECT = range(3)  # values of QTYPE

IHARDWARN, ISOFTLONGWARN, ISOFTWARN, BHARDWARN, BSOFTLONGWARN, BSOFTWARN = range(1, 7)  # values of WARNING
IHARDBELOW, ISOFTBELOW, BHARDBELOW, BSOFTBELOW = range(7, 11)

# WARNING -> (resource, event). Other values are those of a newer kernel.
MEANING: Final[dict[int, tuple[str, str]]] = {
    IHARDWARN: (FILES, OVER_HARD),
    ISOFTLONGWARN: (FILES, OVER_SOFT_LONG),
    ISOFTWARN: (FILES, OVER_SOFT),
    BHARDWARN: (SPACE, OVER_HARD),
    BSOFTLONGWARN: (SPACE, OVER_SOFT_LONG),
    BSOFTWARN: (SPACE, OVER_SOFT),
    IHARDBELOW: (FILES, BELOW),
    ISOFTBELOW: (FILES, BELOW),
    BHARDBELOW: (SPACE, BELOW),
    BSOFTBELOW: (SPACE, BELOW),
}

HEADER: Final = struct.Struct("=IHHII")
MAX_MESSAGE: Final = 4096  # bytes of receive buffer; the kernel's messages have 76

_COMMAND = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_BEFORE_ATTRIBUTES = HEADER.size + _COMMAND.size
_NEST_BITS = 0xC000  # NLA_F_NESTED, NLA_F_NET_BYTEORDER
_SIZES = {QTYPE: 4, EXCESS_ID: 8, WARNING: 4, DEV_MAJOR: 4, DEV_MINOR: 4, CAUSED_ID: 8}
_FORMATS = {4: struct.Struct("=I"), 8: struct.Struct("=Q")}
_WHAT = "quota warning"


class Warned(NamedTuple):
    """One warning, without its sequence number. `warning` and `qtype` may be unknown values."""

    qtype: int
    excess_id: int  # the owner of the quota
    warning: int
    major: int
    minor: int
    caused_id: int  # the uid that wrote


class Figures(NamedTuple):
    """Usage and limits of one resource, in bytes or inodes (limit 0: none). `grace_until`: unix seconds; 0: no grace
    period."""

    used: int
    soft: int
    hard: int
    grace_until: int


NOTHING: Final = Figures(0, 0, 0, 0)


class Quota(NamedTuple):
    """One user's, group's or project's quota on one filesystem, as quotactl(2) returns it."""

    id: int
    space: Figures
    files: Figures

    @property
    def limited(self) -> bool:
        """Whether any limit is set."""
        return bool(self.space.soft or self.space.hard or self.files.soft or self.files.hard)

    def of(self, resource: str) -> Figures:
        """Returns the figures of one resource, SPACE or FILES."""
        return self.files if resource == FILES else self.space


class Message(NamedTuple):
    """One netlink message: type and sequence number from its header, and all of its bytes."""

    type: int
    seq: int
    data: bytes


def messages(datagram: bytes) -> Iterator[Message]:
    """Yields the messages of one datagram. PeerError at the first impossible length."""
    at = 0
    while at < len(datagram):
        left = len(datagram) - at
        if left < HEADER.size:
            raise PeerError(_WHAT, f"{left} bytes are no message", at)
        length, kind, _, seq, _ = HEADER.unpack_from(datagram, at)
        if not HEADER.size <= length <= left:
            raise PeerError(_WHAT, f"nlmsg_len {length}, {left} bytes are left", at)
        yield Message(kind, seq, datagram[at : at + length])
        at += _aligned(length)


def take(message: bytes) -> Warned:
    """Parses exactly one netlink message and skips unknown attributes. PeerError if it is malformed or incomplete."""
    if len(message) < _BEFORE_ATTRIBUTES:
        raise PeerError(_WHAT, f"{len(message)} bytes, at least {_BEFORE_ATTRIBUTES} are needed")
    length = HEADER.unpack_from(message)[0]
    if length != len(message):
        raise PeerError(_WHAT, f"nlmsg_len {length}, {len(message)} bytes are there", 0)
    command = message[HEADER.size]
    if command != COMMAND:
        raise PeerError(_WHAT, f"command {command}, {COMMAND} is known", HEADER.size)
    return take_attributes(message[_BEFORE_ATTRIBUTES:])


def take_attributes(data: bytes) -> Warned:
    """Parses the attributes, all that follows the headers. They are identical for identical events. PeerError."""
    found: dict[int, int] = {}
    at = 0
    while at < len(data):
        if len(data) - at < _ATTRIBUTE.size:
            raise PeerError(_WHAT, "ends within an attribute", at)
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise PeerError(_WHAT, f"an attribute of {length} bytes, {len(data) - at} are left", at)
        kind &= ~_NEST_BITS
        size = _SIZES.get(kind)
        if size is not None:
            if length - _ATTRIBUTE.size != size:
                raise PeerError(_WHAT, f"attribute {kind} has {length - _ATTRIBUTE.size} bytes, not {size}", at)
            found[kind] = _FORMATS[size].unpack_from(data, at + _ATTRIBUTE.size)[0]
        at += _aligned(length)
    missing = _SIZES.keys() - found.keys()
    if missing:
        raise PeerError(_WHAT, f"without attribute {min(missing)}")
    return Warned(*(found[kind] for kind in _SIZES))


def pack(warned: Warned, family: int, seq: int) -> bytes:
    """Returns the message as the kernel would send it, for the played kernel of tests and benchmarks."""
    attributes = b"".join(
        _ATTRIBUTE.pack(_ATTRIBUTE.size + size, kind) + _FORMATS[size].pack(value)
        for (kind, size), value in zip(_SIZES.items(), warned, strict=True)
    )
    head = HEADER.pack(_BEFORE_ATTRIBUTES + len(attributes), family, 0, seq & 0xFFFFFFFF, 0)
    return head + _COMMAND.pack(COMMAND, 1, 0) + attributes


def _aligned(length: int) -> int:
    return (length + 3) & ~3


class Sequence:
    """Counts lost messages by the kernel's sequence number, also if two processors deliver them out of order.

    A skipped number counts as lost until it arrives. The counter has 32 bits and wraps.
    """

    __slots__ = ("lost", "next")

    def __init__(self) -> None:
        self.next = -1  # the expected number; a caller that receives it may increment this itself. -1: any
        self.lost = 0

    def __call__(self, seq: int) -> None:
        """Records a received sequence number."""
        ahead = (seq - self.next) & 0xFFFFFFFF if self.next >= 0 else 0
        if ahead < 0x80000000:
            self.lost += ahead
            self.next = (seq + 1) & 0xFFFFFFFF
        elif self.lost:
            self.lost -= 1  # it arrived out of order, and was counted as lost
