"""The pkcs11 blob, whole, cut short, with junk behind it, and fuzzed; and whatever else needs no token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from upcall_pkcs11.blob import Blob, Flags, Scheme, pack_blob, take_blob
from upcall_pkcs11.pins import FilePins
from upcall_pkcs11.schemes import Ecdh, NotOurs, RsaOaep, check_limits, signature_of
from upcall_pkcs11.uri import Uri

from upcall.core.errors import ModuleFailed, PeerError, UsageError
from upcall.keymodule import Limits

URI = Uri(token="lab", serial="1", object="k", id=b"\1", module_path="/p.so")
TEXT = b"pkcs11:token=lab;serial=1;object=k;id=%01?module-path=/p.so"
BLOBS = [Blob(URI, scheme, Flags(flags)) for scheme in Scheme for flags in range(4)]


def test_a_blob_is_packed_into_these_bytes() -> None:
    assert pack_blob(Blob(URI, Scheme.RSA_OAEP_SHA1, Flags.TOUCH)) == b"\1\1\2\0" + bytes([len(TEXT)]) + TEXT


@pytest.mark.parametrize("blob", BLOBS)
def test_a_blob_is_read_back_as_written(blob: Blob) -> None:
    assert take_blob(pack_blob(blob)) == blob


def test_a_blob_cut_short_or_with_junk_behind_is_a_peer_error() -> None:
    data = pack_blob(BLOBS[0])
    for size in range(len(data)):
        with pytest.raises(PeerError, match="pkcs11 blob"):
            take_blob(data[:size])
    with pytest.raises(PeerError, match="a URI of 59 bytes, 60 are there"):
        take_blob(data + b"x")


def whole(text: bytes, head: bytes = b"\1\1\0") -> bytes:
    return head + len(text).to_bytes(2, "big") + text


@pytest.mark.parametrize(
    ("data", "why", "where"),
    [
        (whole(TEXT, b"\2\1\0"), "version 2, this is 1", 0),
        (whole(TEXT, b"\1\0\0"), "unknown scheme 0", 1),
        (whole(TEXT, b"\1\4\0"), "unknown scheme 4", 1),
        (whole(TEXT, b"\1\1\4"), "unknown flags 0x4", 2),
        (whole(b"\xff"), "not ASCII", 5),
        (whole(TEXT.replace(b"%01", b"%0g")), "two hexadecimal digits", 43),
        (whole(TEXT.replace(b"=k", b"=%6B")), "not in its canonical form", 5),
        (whole(TEXT.replace(b"serial=1;", b"")), "names no module-path, token or serial", 5),
        (whole(TEXT.replace(b"?module-path=/p.so", b"")), "names no module-path, token or serial", 5),
        (whole(TEXT.replace(b";object=k;id=%01", b"")), "names no object", 5),
    ],
)
def test_a_bad_field_is_refused_with_its_position(data: bytes, why: str, where: int) -> None:
    with pytest.raises(PeerError, match=why) as caught:
        take_blob(data)
    assert caught.value.where == where


def test_a_blob_that_could_not_be_read_back_is_not_written() -> None:
    for uri in (URI._replace(serial=None), URI._replace(object=None, id=None), URI._replace(object="x" * 1100)):
        with pytest.raises(UsageError):
            pack_blob(Blob(uri, Scheme.RSA_OAEP_SHA1))


@given(st.binary(max_size=80) | st.binary(max_size=20).map(lambda junk: whole(TEXT + junk)))
def test_any_bytes_are_a_blob_or_a_peer_error(data: bytes) -> None:
    try:
        blob = take_blob(data)
    except PeerError:
        return
    assert pack_blob(blob) == data


# --- wrapping, as far as no token is needed ---------------------------------------------------------------------


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_ecdh_keeps_to_its_sizes_and_refuses_malformed_points(curve: ec.EllipticCurve) -> None:
    key = Ecdh(ec.generate_private_key(curve).public_key())
    for size in (1, 67):
        wrapped = key.wrap(os.urandom(size))
        assert len(wrapped) == key.size(size) <= 512
        key.check(wrapped)
    not_on_the_curve = wrapped[:1] + b"\4" + bytes(len(wrapped) - 2)
    for bad in (b"", wrapped[:-67], b"\2" + wrapped[1:], wrapped + b"x", not_on_the_curve, bytes(512)):
        with pytest.raises(NotOurs):
            key.check(bad)


def test_signatures_tell_schemes_apart() -> None:
    public = rsa.generate_private_key(65537, 2048).public_key()
    assert signature_of(public, Scheme.RSA_OAEP_SHA1) != signature_of(public, Scheme.RSA_OAEP_SHA256)
    upcall_rsa = pytest.importorskip("upcall_rsa", reason="upcall-rsa is not installed")
    assert signature_of(public, Scheme.RSA_OAEP_SHA1) == upcall_rsa.signature_of(public)
    assert RsaOaep(public, Scheme.RSA_OAEP_SHA256).size(67) == 256


def test_limits_that_a_key_cannot_keep_are_refused() -> None:
    public = rsa.generate_private_key(65537, 2048).public_key()
    check_limits(public, Scheme.RSA_OAEP_SHA1, Limits(67, 256))
    for limits in (Limits(67, 255), Limits(300, 512)):
        with pytest.raises(ModuleFailed, match="cannot wrap"):
            check_limits(public, Scheme.RSA_OAEP_SHA1, limits)


@pytest.mark.parametrize(("content", "why"), [(b"", "holds no PIN"), (b"\n", "holds no PIN"), (b"1" * 256, "no PIN")])
def test_a_missing_pin_file_or_one_without_a_pin_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "pin"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ModuleFailed, match=why):
        FilePins(str(path)).pin("token", "prompt")
    with pytest.raises(ModuleFailed, match="No such file"):
        FilePins(str(path) + "x").pin("token", "prompt")
