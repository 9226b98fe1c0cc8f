"""Packs and parses the header of an eCryptfs lower file: the file's size and its wrapped keys. Pure.

Source: fs/ecryptfs/crypto.c (ecryptfs_write_headers_virt) and keystore.c (parse_tag_1_packet, parse_tag_3_packet,
parse_tag_11_packet) of Linux 6.1. All numbers are big-endian.

    0   size of the file in clear, u64
    8   marker: two u32 whose exclusive or is 0x3c81b7f5
    16  flags, u32; the version is in the top byte
    20  size of a header extent, u32       | not in version 0
    24  number of header extents, u16      |
    26  packets, terminated by a byte 0    (version 0: at 20)

    tag 1   01 len 03 signature(8) algorithm wrapped-key
    tag 3   8c len 04 cipher 03 01 salt(8) rounds wrapped-key, and then its
    tag 11  ed len 62 08 "_CONSOLE" date(4) signature(8)

The same bytes can also stand in the extended attribute `user.ecryptfs`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs.packets import (
    CIPHER_AES_192,
    CIPHER_CODES,
    MAX_KEY,
    MAX_WRAPPED,
    pack_length,
    take_length,
)

MAX_HEADER = 4096  # bytes of it that the kernel reads: one extent
MARKER = 0x3C81B7F5  # MAGIC_ECRYPTFS_MARKER
VERSION = 3  # ECRYPTFS_SUPPORTED_FILE_VERSION
LEAST_SIZE = 8192  # ECRYPTFS_MINIMUM_HEADER_EXTENT_SIZE: of all extents together
HMAC, ENCRYPTED, IN_XATTR, ENCRYPTED_NAMES = 1, 2, 4, 8  # flags
XATTR = "user.ecryptfs"

TAG_1, TAG_3, TAG_11 = 0x01, 0x8C, 0xED
CIPHER_NAMES = {
    0x02: "des3_ede",
    0x03: "cast5",
    0x04: "blowfish",
    0x07: "aes",
    0x08: "aes",
    0x09: "aes",
    0x0A: "twofish",
    0x0B: "cast6",
}

_WHAT = "eCryptfs header"
_FIXED = struct.Struct(">QIII")
_EXTENTS = struct.Struct(">IH")
_SIGNATURE = 8
_SALT = 8
_LAST = MAX_HEADER - 8  # bytes: where ecryptfs_parse_packet_set stops reading packets
_NAME_AND_DATE = b"_CONSOLE" + bytes(4)


class PublicKeyPacket(NamedTuple):
    """Tag 1: the file's key, wrapped by a key module. The wrapped data includes the cipher."""

    signature: str  # 16 hexadecimal digits
    wrapped: bytes
    algorithm: int = 1  # RFC 2440 9.1; the kernel always writes 1 (RSA), and ignores it when reading


class PassphrasePacket(NamedTuple):
    """Tags 3 and 11: the file's key, wrapped by the kernel with a key that is derived from a passphrase."""

    signature: str  # 16 hexadecimal digits
    wrapped: bytes
    cipher: int  # RFC 2440 code
    salt: bytes  # 8 bytes
    rounds: int  # u8, encoded as in RFC 2440 3.6.1.3

    @property
    def key_size(self) -> int:
        """Size of the file's key in bytes. Less than that of the wrapped key for AES-192, whose keys are padded."""
        return 24 if self.cipher == CIPHER_AES_192 else len(self.wrapped)


Packet = PublicKeyPacket | PassphrasePacket


class Header(NamedTuple):
    """A parsed header. `marker`: the random half of the marker."""

    size: int
    marker: int
    version: int
    flags: int  # the lower 24 bits; see HMAC and so on
    extent_size: int
    extents: int
    packets: tuple[Packet, ...]

    @property
    def header_size(self) -> int:
        """Size of the header in bytes, which is the offset of the data."""
        return self.extent_size * self.extents


# --- reading -------------------------------------------------------------------------------------------------


def has_marker(data: bytes) -> bool:
    """Returns whether the data begins with an eCryptfs header, valid or not."""
    if len(data) < 16:
        return False
    _, first, second = struct.unpack_from(">QII", data)
    return bool(first ^ second == MARKER)


def take_header(data: bytes) -> Header:
    """Parses a header. `data`: the first bytes of a file, at most MAX_HEADER. PeerError if it is malformed; it names
    the offset. Stricter than the kernel, which accepts some headers whose key is lost."""
    if len(data) < _FIXED.size:
        raise PeerError(_WHAT, f"{len(data)} bytes, at least {_FIXED.size} are needed", len(data))
    size, first, second, flags = _FIXED.unpack_from(data)
    if first ^ second != MARKER:
        raise PeerError(_WHAT, "no marker: this is no eCryptfs file, or it is damaged", 8)
    if size >= 1 << 63:
        raise PeerError(_WHAT, f"a file of {size} bytes", 0)
    version, flags = flags >> 24, flags & 0xFFFFFF
    if version > VERSION:
        raise PeerError(_WHAT, f"format version {version}, at most {VERSION} is known", 16)
    at = _FIXED.size
    extent_size, extents = LEAST_SIZE, 1  # fixed in version 0, which has no such fields
    if version >= 1:
        if len(data) < at + _EXTENTS.size:
            raise PeerError(_WHAT, "ends before the number of header extents", len(data))
        extent_size, extents = _EXTENTS.unpack_from(data, at)
        if extent_size * extents < LEAST_SIZE:
            why = f"{extents} header extents of {extent_size} bytes, at least {LEAST_SIZE} bytes are needed"
            raise PeerError(_WHAT, why, at)
        at += _EXTENTS.size
    packets = tuple(packet for packet, _, _ in _take_packets(data, at))
    return Header(size, first, version, flags, extent_size, extents, packets)


def _take_packets(data: bytes, at: int) -> list[tuple[Packet, int, int]]:
    """Returns the packets from offset `at` on, each with the offsets of its start and end."""
    packets: list[tuple[Packet, int, int]] = []
    while at < len(data) and data[at]:
        tag, start = data[at], at
        packet: Packet
        if tag == TAG_1:
            packet, at = _take_tag_1(data, at)
        elif tag == TAG_3:
            packet, at = _take_tag_3(data, at)
        elif tag == TAG_11:
            raise PeerError(_WHAT, "a tag 11 packet without a tag 3 packet in front of it", at)
        else:
            raise PeerError(_WHAT, f"unknown tag {tag:#04x}", at)
        if not packet.wrapped:
            raise PeerError(_WHAT, "a packet with a wrapped key of 0 bytes: the file's key is lost", start)
        packets.append((packet, start, at))
    if not packets:
        raise PeerError(_WHAT, "no packet with a wrapped key", at)
    return packets


def _take_body(data: bytes, at: int, what: str, least: int) -> tuple[int, int]:
    """Returns the offsets of the start and end of the body of the packet at `at`. PeerError if it is shorter than
    `least` bytes."""
    size, start = take_length(data, at + 1, what)
    if size < least:
        raise PeerError(what, f"a body of {size} bytes, at least {least} are needed", at + 1)
    if start + size > len(data):
        raise PeerError(what, f"says {size} bytes, {len(data) - start} are there", at + 1)
    return start, start + size


def _take_tag_1(data: bytes, at: int) -> tuple[PublicKeyPacket, int]:
    what = "tag 1 packet"
    start, end = _take_body(data, at, what, 2 + _SIGNATURE)
    _expect(data, start, b"\x03", what, "version")
    key_at = start + 2 + _SIGNATURE
    if end - key_at > MAX_WRAPPED:
        raise PeerError(what, f"a wrapped key of {end - key_at} bytes, at most {MAX_WRAPPED} are allowed", at + 1)
    signature = data[start + 1 : start + 1 + _SIGNATURE].hex()
    return PublicKeyPacket(signature, bytes(data[key_at:end]), data[key_at - 1]), end


def _take_tag_3(data: bytes, at: int) -> tuple[PassphrasePacket, int]:
    what = "tag 3 packet"
    start, end = _take_body(data, at, what, 5 + _SALT)
    _expect(data, start, b"\x04", what, "version")
    cipher = data[start + 1]
    if cipher not in CIPHER_CODES:
        raise PeerError(what, f"unknown cipher code {cipher:#04x}", start + 1)
    _expect(data, start + 2, b"\x03", what, "way of making keys of passphrases (S2K)")
    _expect(data, start + 3, b"\x01", what, "hash")
    rounds_at = start + 4 + _SALT
    wrapped = bytes(data[rounds_at + 1 : end])
    if len(wrapped) > MAX_KEY:  # a block cipher without padding: wrapped and clear key have the same size
        raise PeerError(what, f"a wrapped key of {len(wrapped)} bytes, at most {MAX_KEY} are possible", at + 1)
    signature, behind = _take_tag_11(data, end)
    return PassphrasePacket(signature, wrapped, cipher, bytes(data[start + 4 : rounds_at]), data[rounds_at]), behind


def _take_tag_11(data: bytes, at: int) -> tuple[str, int]:
    what = "tag 11 packet"
    if at >= len(data):
        raise PeerError(what, "is missing behind a tag 3 packet", at)
    _expect(data, at, bytes((TAG_11,)), what, "tag behind a tag 3 packet")
    start, end = _take_body(data, at, what, 14)
    _expect(data, start, b"\x62", what, "format")
    _expect(data, start + 1, b"\x08", what, "length of a name")
    signature = data[start + 14 : end]
    if len(signature) != _SIGNATURE:
        raise PeerError(what, f"a signature of {len(signature)} bytes, {_SIGNATURE} are needed", at + 1)
    return signature.hex(), end


def _expect(data: bytes, at: int, byte: bytes, what: str, called: str) -> None:
    if data[at : at + 1] != byte:
        raise PeerError(what, f"{called} {data[at]:#04x}, {byte[0]:#04x} is known", at)


# --- writing -------------------------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """Returns the bytes of a header, up to its last packet: zeros follow in the file. PeerError if `take_header` would
    reject them."""
    flags = header.version << 24 | header.flags
    try:
        fixed = _FIXED.pack(header.size, header.marker, header.marker ^ MARKER, flags)
        extents = _EXTENTS.pack(header.extent_size, header.extents) if header.version else b""
        data = b"".join((fixed, extents, *map(_pack_packet, header.packets)))
    except (struct.error, ValueError) as error:
        raise PeerError(_WHAT, str(error)) from None
    if len(data) > MAX_HEADER or take_header(data) != header:
        raise PeerError(_WHAT, "would not be read as it is written")
    return data


class Change(NamedTuple):
    """Bytes of a header to be replaced: as many as they replace."""

    at: int  # offset
    old: bytes
    new: bytes


def replace_packets(data: bytes, dropped: Collection[int], added: PublicKeyPacket | None) -> Change:
    """Returns the change that drops the packets with these numbers from the header in `data`, the first MAX_HEADER
    bytes of a lower file, and adds one: in the place of the first that is dropped, otherwise behind the last.

    The change concerns packets only: the kernel writes the file's size, in front of them, whenever it changes. The
    other packets keep their bytes. PeerError if the header is malformed, or the new packets do not fit.
    """
    header = take_header(data)
    start = _FIXED.size + (_EXTENTS.size if header.version else 0)
    found = _take_packets(data, start)
    place = min(dropped, default=len(found))
    packets: list[Packet] = []
    parts: list[bytes] = []
    for number, (packet, begin, end) in enumerate(found):
        if number == place and added is not None:
            packets.append(added)
            parts.append(_pack_packet(added))
        if number not in dropped:
            packets.append(packet)
            parts.append(data[begin:end])
    if place == len(found) and added is not None:
        packets.append(added)
        parts.append(_pack_packet(added))
    new = b"".join(parts)
    size = max(len(new) + 1, found[-1][2] - start)  # with the byte 0 that terminates them
    if start + size > _LAST or start + size > len(data):
        raise PeerError(_WHAT, f"has no room for packets of {len(new)} bytes", start)
    change = Change(start, data[start : start + size], new.ljust(size, b"\0"))
    if take_header(data[:start] + change.new + data[start + size :]) != header._replace(packets=tuple(packets)):
        raise PeerError(_WHAT, "would not be read as it is written")
    return change


def _pack_packet(packet: Packet) -> bytes:
    signature = bytes.fromhex(packet.signature)
    if isinstance(packet, PublicKeyPacket):
        return _pack_body(TAG_1, b"\x03" + signature + bytes((packet.algorithm,)) + packet.wrapped)
    body = bytes((0x04, packet.cipher, 0x03, 0x01)) + packet.salt + bytes((packet.rounds,)) + packet.wrapped
    return _pack_body(TAG_3, body) + _pack_body(TAG_11, b"\x62\x08" + _NAME_AND_DATE + signature)


def _pack_body(tag: int, body: bytes) -> bytes:
    return bytes((tag,)) + pack_length(len(body)) + body
