"""Auth tokens: what stands in the user keyring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.keymodule import MAX_BLOB
from upcall.protocols.ecryptfs import authtok
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok, take_auth_tok

VECTOR: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "ecryptfs.json").read_text())["auth_tok"]
CAPTURED = bytes.fromhex(VECTOR["hex"])
SIGNATURE = "0123456789abcdef"

tokens = st.builds(
    AuthTok,
    st.text("0123456789abcdef", min_size=16, max_size=16),
    st.text("abcxyz-_09", min_size=1, max_size=16),
    st.binary(max_size=200) | st.sampled_from([bytes(MAX_BLOB), b"x" * 71, b"x" * 70]),
)


def test_the_captured_token_is_read_and_written_the_same() -> None:
    token = take_auth_tok(CAPTURED)
    assert (token.signature, token.alias) == (VECTOR["signature"], VECTOR["alias"])
    path, passphrase = VECTOR["path"].encode(), VECTOR["passphrase"].encode()
    assert path + b"\0" in token.blob
    assert token.blob.endswith(passphrase + b"\0")
    assert pack_auth_tok(token) == CAPTURED


@given(tokens)
def test_any_token_is_read_back_as_written(token: AuthTok) -> None:
    data = pack_auth_tok(token)
    assert len(data) == authtok.STRUCT_SIZE + len(token.blob)
    assert take_auth_tok(data) == token


def test_a_token_cut_short_anywhere_is_a_peer_error() -> None:
    token = AuthTok(SIGNATURE, "toy", b"x" * 300)
    data = pack_auth_tok(token)
    for end in range(len(data)):
        if end >= authtok.BLOB_AT + len(token.blob):  # what follows the blob is padding
            assert take_auth_tok(data[:end]) == token
            continue
        with pytest.raises(PeerError):
            take_auth_tok(data[:end])
    assert take_auth_tok(data + b"trailing") == token


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(0, b"\x03\x00", id="version"),
        pytest.param(2, b"\x00\x00", id="a passphrase token"),
        pytest.param(632, b"\xff\xff\xff\xff", id="data_len"),
        pytest.param(632, b"\x01\x10\x00\x00", id="data_len above ours"),
        pytest.param(636, b"\0", id="no signature"),
        pytest.param(644, b"\0", id="a short signature"),
        pytest.param(652, b"x", id="a signature without end"),
        pytest.param(653, b"\0", id="no alias"),
        pytest.param(653, b"x" * 17, id="an alias without end"),
        pytest.param(653, b"\xff", id="an alias that is not ASCII"),
        pytest.param(653, b"\n", id="an alias that is not printable"),
    ],
)
def test_a_token_with_a_bad_field_is_a_peer_error(at: int, value: bytes) -> None:
    data = bytearray(pack_auth_tok(AuthTok(SIGNATURE, "toy", b"blob")))
    data[at : at + len(value)] = value
    with pytest.raises(PeerError):
        take_auth_tok(bytes(data))


@pytest.mark.parametrize(
    "token",
    [
        AuthTok("short", "toy", b""),
        AuthTok(SIGNATURE, "", b""),
        AuthTok(SIGNATURE, "x" * 17, b""),
        AuthTok(SIGNATURE, "a\0b", b""),
        AuthTok(SIGNATURE, "toy", bytes(MAX_BLOB + 1)),
    ],
    ids=["short signature", "no alias", "long alias", "NUL in the alias", "long blob"],
)
def test_a_token_that_could_not_be_read_back_is_not_written(token: AuthTok) -> None:
    with pytest.raises(PeerError):
        pack_auth_tok(token)


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    data = bytearray(pack_auth_tok(draw(tokens)))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.sampled_from([*range(4), *range(628, 680)]))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.sampled_from([len(data), 740, 739, 700]))])


@given(nearly_right() | st.binary(max_size=900))
def test_any_bytes_give_a_token_that_can_be_written_or_a_peer_error(data: bytes) -> None:
    try:
        token = take_auth_tok(data)
    except PeerError:
        return
    assert take_auth_tok(pack_auth_tok(token)) == token


def test_the_repr_does_not_show_the_blob() -> None:
    assert "hunter2" not in repr(AuthTok(SIGNATURE, "toy", b"hunter2"))
