"""The openssl blob: whole, cut short, with junk behind it, and whatever hypothesis thinks of."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upcall_rsa.blob import Blob, pack_blob, take_blob

from upcall.core.errors import PeerError, UsageError

COMPAT = Blob("/home/tester/.ecryptfs/pki/key.pem", None, b"labpass")
OURS = [Blob("/k.pem", source) for source in ("ask", "keyring", "none", "file:/run/secret")]


def field(content: bytes) -> bytes:
    return struct.pack("=H", len(content)) + content


@pytest.mark.parametrize("blob", [COMPAT, *OURS])
def test_a_blob_is_read_back_as_written(blob: Blob) -> None:
    assert take_blob(pack_blob(blob)) == blob


def test_a_blob_is_packed_into_these_bytes() -> None:
    assert pack_blob(COMPAT) == field(b"/home/tester/.ecryptfs/pki/key.pem\0") + field(b"labpass\0")
    assert pack_blob(OURS[0]) == field(b"/k.pem\0") + field(b"\0") + field(b"ask\0")


def test_an_old_blob_of_an_unencrypted_key_has_the_source_none() -> None:
    assert take_blob(field(b"/k.pem\0") + field(b"\0")) == Blob("/k.pem", "none")


@pytest.mark.parametrize("blob", [COMPAT, *OURS])
def test_a_blob_cut_short_anywhere_is_a_peer_error(blob: Blob) -> None:
    data = pack_blob(blob)
    for size in range(len(data)):
        if take_old_end(data) == size:
            continue  # where the tail begins, an old blob ends
        with pytest.raises(PeerError, match="openssl blob"):
            take_blob(data[:size])


def take_old_end(data: bytes) -> int:
    """Where the two fields end that ecryptfs-utils reads; 0 if there is nothing behind them."""
    at = 0
    for _ in range(2):
        at += 2 + int(struct.unpack_from("=H", data, at)[0])
    return at if at < len(data) else 0


@pytest.mark.parametrize("blob", [COMPAT, *OURS])
def test_a_blob_with_junk_behind_is_a_peer_error(blob: Blob) -> None:
    with pytest.raises(PeerError):
        take_blob(pack_blob(blob) + b"x")


@pytest.mark.parametrize(
    ("data", "why", "where"),
    [
        (b"", "ends before the path", 0),
        (field(b""), "a path of 0 bytes", 0),
        (field(b"/k\0") + field(b"x"), "the passphrase does not end in its only NUL", 7),
        (field(b"/k\0x\0") + field(b"\0"), "the path does not end in its only NUL", 2),
        (field(b"k\0") + field(b"\0"), "the path is not absolute", 2),
        (field(b"/" * 1025 + b"\0") + field(b"\0"), "a path of 1026 bytes", 0),
        (field(b"/k\0") + b"\xff\xff", "a passphrase of 65535 bytes", 5),
        (field(b"/k\0") + field(b"p\0") + field(b"ask\0"), "also says where it is kept", 9),
        (field(b"/k\0") + field(b"\0") + field(b"moon\0"), "says nothing about where", 10),
        (field(b"/k\0") + field(b"\0") + field(b"file:x\0"), "says nothing about where", 10),
    ],
)
def test_a_bad_field_is_refused_with_its_position(data: bytes, why: str, where: int) -> None:
    with pytest.raises(PeerError, match=why) as caught:
        take_blob(data)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "blob",
    [
        Blob("k.pem", "ask"),
        Blob("/k\0", "ask"),
        Blob("/k", None),
        Blob("/k", None, b"a\0b"),
        Blob("/k", None, b"p" * 1025),
        Blob("/" * 1025, "ask"),
        Blob("/k", "elsewhere"),
        Blob("/k", "file:relative"),
    ],
    ids=[
        "relative path",
        "NUL in the path",
        "no source",
        "NUL in the passphrase",
        "long passphrase",
        "long path",
        "unknown source",
        "relative source",
    ],
)
def test_a_blob_that_could_not_be_read_back_is_not_written(blob: Blob) -> None:
    with pytest.raises(UsageError):
        pack_blob(blob)


def test_the_repr_shows_no_secret() -> None:
    assert "labpass" not in repr(COMPAT)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_blob_or_a_peer_error(data: bytes) -> None:
    try:
        blob = take_blob(data)
    except PeerError:
        return
    assert take_blob(pack_blob(blob)) == blob


@given(
    st.lists(st.binary(max_size=12).map(lambda content: field(content + b"\0")), max_size=4).map(b"".join),
    st.binary(max_size=3),
)
def test_nearly_right_bytes_are_a_blob_or_a_peer_error(fields: bytes, junk: bytes) -> None:
    test_any_bytes_are_a_blob_or_a_peer_error.hypothesis.inner_test(fields + junk)  # type: ignore[attr-defined]
