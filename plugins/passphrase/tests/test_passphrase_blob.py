"""The passphrase blob: whole, cut short, with junk behind it, and whatever hypothesis thinks of."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upcall_passphrase.blob import Blob, pack_blob, signature_of, take_blob
from upcall_passphrase.derived import Cost

from upcall.core.errors import PeerError, UsageError

SALT, CHECK = bytes(range(16)), bytes(range(16, 32))
BLOBS = [
    Blob(Cost(64, 3), SALT, CHECK, "ask"),
    Blob(Cost(1, 8), SALT, CHECK, "keyring"),
    Blob(Cost(256, 2), CHECK, SALT, "file:/run/secret\udcff"),
]
HEAD = b"\x01\x00\x40\x03" + SALT + CHECK


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_is_read_back_as_written(blob: Blob) -> None:
    assert take_blob(pack_blob(blob)) == blob


def test_a_blob_is_packed_into_these_bytes() -> None:
    assert pack_blob(BLOBS[0]) == HEAD + b"\x00\x03ask"


def test_the_signature_covers_everything_but_the_source() -> None:
    assert signature_of(BLOBS[0]) == hashlib.sha256(b"upcall passphrase 1: signature\0" + HEAD).hexdigest()[:16]
    assert signature_of(BLOBS[0]._replace(source="keyring")) == signature_of(BLOBS[0])
    others = [
        BLOBS[0]._replace(salt=CHECK),
        BLOBS[0]._replace(check=SALT),
        BLOBS[0]._replace(cost=Cost(64, 4)),
        BLOBS[0]._replace(cost=Cost(65, 3)),
    ]
    assert len({signature_of(blob) for blob in [BLOBS[0], *others]}) == 5


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_cut_short_anywhere_is_a_peer_error(blob: Blob) -> None:
    data = pack_blob(blob)
    for size in range(len(data)):
        with pytest.raises(PeerError, match="passphrase blob"):
            take_blob(data[:size])


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_with_junk_behind_is_a_peer_error(blob: Blob) -> None:
    with pytest.raises(PeerError, match="are there at byte 36"):
        take_blob(pack_blob(blob) + b"x")


@pytest.mark.parametrize(
    ("data", "why", "where"),
    [
        (b"", "0 bytes, at least 38", None),
        (b"\x02" + HEAD[1:] + b"\0\3ask", "version 2", 0),
        (HEAD + b"\0\4ask", "a source of 4 bytes, 3 are there", 36),
        (HEAD + b"\x04\x01" + b"x" * 1025, "a source of 1025 bytes", 36),
        (HEAD + b"\0\4none", "says nothing about where", 38),
        (HEAD + b"\0\0", "says nothing about where", 38),
        (HEAD + b"\0\6file:x", "says nothing about where", 38),
        (HEAD + b"\0\7file:/\0", "says nothing about where", 38),
        (b"\x01\x00\x00\x03" + HEAD[4:] + b"\0\3ask", "0 MiB gone through 3 times", 1),
        (b"\x01\x00\x40\x00" + HEAD[4:] + b"\0\3ask", "64 MiB gone through 0 times", 1),
        (b"\x01\xff\xff\xff" + HEAD[4:] + b"\0\3ask", "65535 MiB gone through 255 times", 1),
        (b"\x01\x01\x00\x03" + HEAD[4:] + b"\0\3ask", "256 MiB gone through 3 times", 1),
    ],
)
def test_a_bad_field_is_refused_with_its_position(data: bytes, why: str, where: int | None) -> None:
    with pytest.raises(PeerError, match=why) as caught:
        take_blob(data)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "blob",
    [
        BLOBS[0]._replace(source="none"),
        BLOBS[0]._replace(source="compat"),
        BLOBS[0]._replace(source="file:/" + "x" * 1024),
        BLOBS[0]._replace(salt=SALT[:15]),
        BLOBS[0]._replace(check=b""),
        BLOBS[0]._replace(cost=Cost(257, 1)),
        BLOBS[0]._replace(cost=Cost(1, 9)),
    ],
    ids=["source none", "source compat", "long source", "short salt", "no check", "memory", "passes"],
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


@given(st.binary(max_size=80))
def test_any_bytes_are_a_blob_or_a_peer_error(data: bytes) -> None:
    survives(data)


@given(
    st.binary(min_size=3, max_size=3),
    st.sampled_from([b"\0\3ask", b"\0\7keyring", b"\0\4none", b"\0\7file:/x", b"\0\7file:/\xff"]),
    st.binary(max_size=1),
)
def test_nearly_right_bytes_are_a_blob_or_a_peer_error(cost: bytes, source: bytes, junk: bytes) -> None:
    survives(b"\x01" + cost + SALT + CHECK + source + junk)
