"""Lower files' headers: captured ones, packed ones, every byte missing or changed, and what hypothesis thinks of."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs import header as wire
from upcall.protocols.ecryptfs.header import Header, PassphrasePacket, PublicKeyPacket, pack_header, take_header
from upcall.protocols.ecryptfs.packets import AES_SIZES, CIPHER_CODES

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "ecryptfs.json").read_text())
CAPTURED = {name: bytes.fromhex(text) for name, text in VECTORS["lower_header"].items()}
SIGNATURE = "80f0e50e8a936f95"
PUBLIC = PublicKeyPacket(SIGNATURE, b"w" * 256)
PASSPHRASE = PassphrasePacket("0123456789abcdef", b"k" * 16, 0x07, b"saltsalt", 0x60)
HEADER = Header(5, 0xDEADBEEF, 3, wire.ENCRYPTED, 4096, 2, (PUBLIC, PASSPHRASE))


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_header_is_read_and_written_the_same(name: str) -> None:
    data = CAPTURED[name]
    header = take_header(data)
    assert (header.size, header.version, header.flags) == (100, 3, wire.ENCRYPTED)
    assert (header.extent_size, header.extents, header.header_size) == (4096, 2, 8192)
    (packet,) = header.packets
    assert isinstance(packet, PublicKeyPacket)
    assert (packet.signature, packet.algorithm, len(packet.wrapped)) == (SIGNATURE, 1, 256)
    packed = pack_header(header)
    assert data[: len(packed)] == packed
    assert not any(data[len(packed) :])


def test_a_passphrase_packet_is_written_as_by_the_kernel() -> None:
    """As write_tag_3_packet and write_tag_11_packet write them."""
    packed = pack_header(HEADER._replace(packets=(PASSPHRASE,)))
    tag_3 = bytes.fromhex("8c1d04070301") + b"saltsalt" + b"\x60" + b"k" * 16
    tag_11 = bytes.fromhex("ed166208") + b"_CONSOLE" + bytes(4) + bytes.fromhex("0123456789abcdef")
    assert packed[26:] == tag_3 + tag_11
    assert PASSPHRASE.key_size == 16


def test_an_aes_192_key_is_padded() -> None:
    packet = PASSPHRASE._replace(cipher=0x08, wrapped=b"k" * 32)
    (read,) = take_header(pack_header(HEADER._replace(packets=(packet,)))).packets
    assert isinstance(read, PassphrasePacket)
    assert read.key_size == 24


def test_a_header_of_version_0_is_written_without_extents() -> None:
    header = HEADER._replace(version=0, extent_size=8192, extents=1)
    packed = pack_header(header)
    assert packed[20] == wire.TAG_1
    assert take_header(packed) == header


def test_a_header_with_zeros_behind_is_read_the_same() -> None:
    packed = pack_header(HEADER)
    assert take_header(packed) == take_header(packed.ljust(4096, b"\0")) == HEADER


def test_a_header_cut_short_is_refused_except_between_packets() -> None:
    """A header may end between two packets; nowhere else."""
    packed = pack_header(HEADER)
    between = len(pack_header(HEADER._replace(packets=(PUBLIC,))))
    for size in range(len(packed)):
        if size == between:
            assert take_header(packed[:size]).packets == (PUBLIC,)
            continue
        with pytest.raises(PeerError) as caught:
            take_header(packed[:size])
        assert caught.value.where is not None


def changed(at: int, new: bytes, header: Header = HEADER) -> bytes:
    packed = bytearray(pack_header(header))
    packed[at : at + len(new)] = new
    return bytes(packed)


TAG_3_AT = 26 + 3 + 10 + 256
TAG_11_AT = TAG_3_AT + 2 + 29


@pytest.mark.parametrize(
    ("data", "why", "where"),
    [
        (b"", "0 bytes, at least 20", 0),
        (bytes(4096), "no marker", 8),
        (changed(8, b"\xff"), "no marker", 8),
        (changed(0, b"\x80"), "a file of 9223372036854775813 bytes", 0),
        (changed(16, b"\x04"), "format version 4", 16),
        (changed(20, bytes(4)), "2 header extents of 0 bytes", 20),
        (changed(24, b"\0\1"), "1 header extents of 4096 bytes", 20),
        (changed(26, b"\0"), "no packet with a wrapped key", 26),
        (changed(26, b"\x05"), "unknown tag 0x05", 26),
        (changed(26, b"\xed"), "a tag 11 packet without a tag 3 packet", 26),
        (changed(27, b"\xff"), "length byte 0xff", 27),
        (changed(27, b"\xc0\x00"), "unknown tag", 26 + 3 + 192),
        (changed(27, b"\x09"), "a body of 9 bytes, at least 10", 27),
        (changed(27, b"\xd0\x00"), "says 4288 bytes", 27),
        (changed(27, b"\x0a\x03"), "a wrapped key of 0 bytes: the file's key is lost", 26),
        (changed(29, b"\x04"), "version 0x04, 0x03 is known", 29),
        (changed(TAG_3_AT + 1, b"\x0c"), "a body of 12 bytes, at least 13", TAG_3_AT + 1),
        (changed(TAG_3_AT + 2, b"\x03"), "version 0x03, 0x04 is known", TAG_3_AT + 2),
        (changed(TAG_3_AT + 3, b"\x63"), "unknown cipher code 0x63", TAG_3_AT + 3),
        (changed(TAG_3_AT + 4, b"\x01"), "S2K", TAG_3_AT + 4),
        (changed(TAG_3_AT + 5, b"\x02"), "hash 0x02", TAG_3_AT + 5),
        (changed(TAG_11_AT, b"\0"), "tag behind a tag 3 packet 0x00", TAG_11_AT),
        (changed(TAG_11_AT + 1, b"\x0d"), "a body of 13 bytes", TAG_11_AT + 1),
        (changed(TAG_11_AT + 1, b"\x15"), "a signature of 7 bytes", TAG_11_AT + 1),
        (changed(TAG_11_AT + 2, b"\x61"), "format 0x61", TAG_11_AT + 2),
        (changed(TAG_11_AT + 3, b"\x07"), "length of a name 0x07", TAG_11_AT + 3),
    ],
)
def test_a_bad_field_is_refused_with_its_position(data: bytes, why: str, where: int) -> None:
    with pytest.raises(PeerError, match=why.replace("(", r"\(")) as caught:
        take_header(data)
    assert caught.value.where == where
    assert f"at byte {where}" in str(caught.value)


def test_a_wrapped_key_that_the_kernel_has_no_room_for_is_refused() -> None:
    body = b"\x03" + bytes(9) + bytes(513)
    data = pack_header(HEADER)[:26] + b"\x01\xc1\x4b" + body
    with pytest.raises(PeerError, match="a wrapped key of 513 bytes") as caught:
        take_header(data)
    assert caught.value.where == 27


@pytest.mark.parametrize(
    "header",
    [
        HEADER._replace(size=1 << 64),
        HEADER._replace(flags=1 << 24),
        HEADER._replace(version=4),
        HEADER._replace(extents=1),
        HEADER._replace(packets=()),
        HEADER._replace(packets=(PUBLIC._replace(signature="80f0"),)),
        HEADER._replace(packets=(PUBLIC._replace(signature="nonsense nonsens"),)),
        HEADER._replace(packets=(PUBLIC._replace(algorithm=256),)),
        HEADER._replace(packets=(PUBLIC._replace(wrapped=b""),)),
        HEADER._replace(packets=(PUBLIC._replace(wrapped=bytes(513)),)),
        HEADER._replace(packets=(PUBLIC,) * 16),
        HEADER._replace(packets=(PASSPHRASE._replace(salt=b"short"),)),
        HEADER._replace(packets=(PASSPHRASE._replace(cipher=0x63),)),
    ],
    ids=[
        "size",
        "flags",
        "version",
        "extents",
        "no packets",
        "short signature",
        "signature not hexadecimal",
        "algorithm",
        "no wrapped key",
        "long wrapped key",
        "many packets",
        "short salt",
        "cipher",
    ],
)
def test_a_header_that_could_not_be_read_back_is_not_written(header: Header) -> None:
    with pytest.raises(PeerError):
        pack_header(header)


signatures = st.binary(min_size=8, max_size=8).map(bytes.hex)
public_keys = st.builds(
    PublicKeyPacket, signatures, st.binary(min_size=1, max_size=512), algorithm=st.integers(0, 255)
)
passphrases = st.builds(
    PassphrasePacket,
    signatures,
    st.binary(min_size=1, max_size=64),
    st.sampled_from(sorted(CIPHER_CODES)),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 255),
)
headers = st.builds(
    Header,
    st.integers(0, (1 << 63) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(1, 3),
    st.integers(0, (1 << 24) - 1),
    st.integers(8192, (1 << 32) - 1),
    st.integers(1, (1 << 16) - 1),
    st.lists(public_keys | passphrases, min_size=1, max_size=5).map(tuple),
)


@given(headers)
def test_any_header_is_read_back_as_written(header: Header) -> None:
    packed = pack_header(header)
    assert take_header(packed) == take_header(packed + b"\0junk") == header


@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_are_a_header_or_a_peer_error_with_a_position(data: bytes, marked: bool) -> None:
    if marked:
        data = struct.pack(">QII", 1, 7, 7 ^ wire.MARKER) + b"\x03\0\0\2\0\0\x10\0\0\2" + data
    try:
        header = take_header(data)
    except PeerError as error:
        assert error.where is not None
        assert 0 <= error.where <= len(data) or not data
        return
    assert take_header(pack_header(header)) == header


@given(headers, st.data())
def test_a_header_with_a_wrong_byte_is_read_or_refused_with_a_position(header: Header, data: st.DataObject) -> None:
    packed = bytearray(pack_header(header))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    try:
        take_header(bytes(packed))
    except PeerError as error:
        assert error.where is not None
        assert 0 <= error.where <= len(packed)


def test_the_marker_is_found_in_headers_only() -> None:
    assert wire.has_marker(CAPTURED["root_upstream_f0"])
    assert not wire.has_marker(b"short")
    assert not wire.has_marker(bytes(100))


def test_every_cipher_has_a_name() -> None:
    assert set(wire.CIPHER_NAMES) == CIPHER_CODES >= set(AES_SIZES)
