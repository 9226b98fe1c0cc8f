"""The codec of NegTokenInit: bytes as they stand in RFC 4178 and X.690, and everything that is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upcall_spnego.negtoken import KRB5, MS_KRB5, SPNEGO, pack_negtokeninit, pack_oid, take_negtokeninit, take_oid

from upcall.core.errors import PeerError

# By hand: [APPLICATION 0] { 1.3.6.1.5.5.2, [0] SEQUENCE { [0] SEQUENCE { krb5 }, [2] OCTET STRING "token" } }
SHORT = bytes.fromhex("6027 06062b0601050502 a01d 301b a00d 300b 06092a864886f712010202 a20a 0408") + b"a token!"


def test_a_token_is_packed_and_taken_as_in_the_rfc() -> None:
    assert pack_negtokeninit(KRB5, b"a token!") == SHORT.replace(b"\x60\x27", b"\x60\x27")
    assert take_negtokeninit(SHORT) == ((KRB5,), b"a token!")


@pytest.mark.parametrize(
    ("dotted", "packed"),
    [
        (SPNEGO, "06062b0601050502"),
        (KRB5, "06092a864886f712010202"),
        (MS_KRB5, "06092a864882f712010202"),
        ("2.999.3", "0603883703"),
    ],
)
def test_an_object_identifier_is_packed_and_taken_as_der(dotted: str, packed: str) -> None:
    assert pack_oid(dotted) == bytes.fromhex(packed)
    assert take_oid(bytes.fromhex(packed)[2:]) == dotted


@pytest.mark.parametrize("content", [b"", b"\x2a\x86"])
def test_a_malformed_object_identifier_is_a_peer_error(content: bytes) -> None:
    with pytest.raises(PeerError):
        take_oid(content)


@pytest.mark.parametrize("size", [0, 1, 90, 100, 127, 128, 200, 255, 256, 700, 65535, 65536])
@pytest.mark.parametrize("mechanism", [KRB5, MS_KRB5])
def test_a_token_of_any_size_is_read_back_as_written(mechanism: str, size: int) -> None:
    token = bytes(size)
    assert take_negtokeninit(pack_negtokeninit(mechanism, token)) == ((mechanism,), token)


@pytest.mark.parametrize("whole", [SHORT, pack_negtokeninit(KRB5, bytes(300))], ids=["short", "long"])
def test_a_token_cut_short_or_too_long_is_a_peer_error(whole: bytes) -> None:
    for size in range(len(whole)):
        with pytest.raises(PeerError):
            take_negtokeninit(whole[:size])
    with pytest.raises(PeerError):
        take_negtokeninit(whole + b"\0")


@pytest.mark.parametrize(
    "length",
    ["8127", "820027", "80", "ff", "8527"],
    ids=["not the shortest", "a leading zero", "indefinite", "reserved", "five bytes"],
)
def test_a_length_that_is_not_der_is_a_peer_error(length: str) -> None:
    with pytest.raises(PeerError):
        take_negtokeninit(b"\x60" + bytes.fromhex(length) + SHORT[2:])


@pytest.mark.parametrize("at", [0, 2, 10, 12, 14, 16, 18, 29, 31])
def test_a_wrong_tag_anywhere_is_a_peer_error(at: int) -> None:
    broken = bytearray(SHORT)
    broken[at] ^= 0x40
    with pytest.raises(PeerError):
        take_negtokeninit(bytes(broken))


def test_a_token_of_another_mechanism_than_spnego_is_a_peer_error() -> None:
    with pytest.raises(PeerError, match=r"1\.3\.6\.1\.5\.5\.3"):
        take_negtokeninit(SHORT.replace(bytes.fromhex("2b0601050502"), bytes.fromhex("2b0601050503")))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        take_negtokeninit(data)
