"""The x25519 blob: whole, cut short, with junk behind it, and whatever hypothesis thinks of."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upcall_x25519.blob import Blob, pack_blob, take_blob

from upcall.core.errors import PeerError, UsageError

BLOBS = [
    Blob("/home/tester/key.pem", "ask", 0x12),
    Blob("/k", "keyring", 0x11),
    Blob("/k\udcff", "none", 0x13),
    Blob("/k", "file:/run/secret", 0x12),
]


def field(content: bytes) -> bytes:
    return struct.pack("!H", len(content)) + content


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_is_read_back_as_written(blob: Blob) -> None:
    assert take_blob(pack_blob(blob)) == blob


def test_a_blob_is_packed_into_these_bytes() -> None:
    assert pack_blob(BLOBS[0]) == b"\x01\x12\x00\x14/home/tester/key.pem\x00\x03ask"
    assert pack_blob(BLOBS[2]) == b"\x01\x13\x00\x03/k\xff\x00\x04none"


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_cut_short_anywhere_is_a_peer_error(blob: Blob) -> None:
    data = pack_blob(blob)
    for size in range(len(data)):
        with pytest.raises(PeerError, match="x25519 blob"):
            take_blob(data[:size])


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_with_junk_behind_is_a_peer_error(blob: Blob) -> None:
    with pytest.raises(PeerError, match="1 bytes too many"):
        take_blob(pack_blob(blob) + b"x")


@pytest.mark.parametrize(
    ("data", "why", "where"),
    [
        (b"", "0 bytes, at least 2", None),
        (b"\x02\x12", "version 2", 0),
        (b"\x01\x12", "ends before the path", 2),
        (b"\x01\x12" + field(b"/k"), "ends before the source", 6),
        (b"\x01\x12\xff\xff/k", "a path of 65535 bytes, 2 are there", 2),
        (b"\x01\x12" + field(b"/" * 1025) + field(b"ask"), "a path of 1025 bytes", 2),
        (b"\x01\x12" + field(b"/k") + b"\0\x04ask", "a source of 4 bytes, 3 are there", 6),
        (b"\x01\x14" + field(b"/k") + field(b"ask"), "unknown form 0x14", None),
        (b"\x01\x12" + field(b"k") + field(b"ask"), "must be absolute", None),
        (b"\x01\x12" + field(b"/k\0") + field(b"ask"), "must be absolute", None),
        (b"\x01\x12" + field(b"") + field(b"ask"), "must be absolute", None),
        (b"\x01\x12" + field(b"/k") + field(b"moon"), "says nothing about where", None),
        (b"\x01\x12" + field(b"/k") + field(b"file:x"), "says nothing about where", None),
        (b"\x01\x12" + field(b"/k") + field(b"file:/x\0y"), "says nothing about where", None),
        (b"\x01\x12" + field(b"/k") + field(b""), "says nothing about where", None),
    ],
)
def test_a_bad_field_is_refused_with_its_position(data: bytes, why: str, where: int | None) -> None:
    with pytest.raises(PeerError, match=why) as caught:
        take_blob(data)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "blob",
    [
        Blob("k.pem", "ask", 0x12),
        Blob("/k\0", "ask", 0x12),
        Blob("/" * 1025, "ask", 0x12),
        Blob("/k", "elsewhere", 0x12),
        Blob("/k", "file:relative", 0x12),
        Blob("/k", "file:/" + "x" * 1024, 0x12),
        Blob("/k", "ask", 0x02),
    ],
    ids=[
        "relative path",
        "NUL in the path",
        "long path",
        "unknown source",
        "relative source",
        "long source",
        "unknown form",
    ],
)
def test_a_blob_that_could_not_be_read_back_is_not_written(blob: Blob) -> None:
    with pytest.raises(UsageError):
        pack_blob(blob)


def survives(data: bytes) -> None:
    try:
        blob = take_blob(data)
    except PeerError:
        return
    assert pack_blob(blob) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_a_blob_or_a_peer_error(data: bytes) -> None:
    survives(data)


_PIECES = st.sampled_from([b"/k", b"/k\xff", b"ask", b"none", b"file:/x", b"", b"k", b"\0", b"keyring"])


@given(
    st.sampled_from([b"\x01", b"\x02"]),
    st.sampled_from([b"\x11", b"\x12", b"\x13", b"\x10"]),
    st.lists(_PIECES.map(field), max_size=3).map(b"".join),
    st.binary(max_size=2),
)
def test_nearly_right_bytes_are_a_blob_or_a_peer_error(
    version: bytes, form: bytes, fields: bytes, junk: bytes
) -> None:
    survives(version + form + fields + junk)
