"""The bodies of request_key conversations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.request_key import messages as requestkey
from upcall.protocols.request_key.messages import (
    Ask,
    Instance,
    Upcall,
    pack_ask,
    pack_instance,
    pack_upcall,
    take_ask,
    take_described,
    take_instance,
    take_upcall,
)

UPCALL = Upcall(0x3DB2E4F1, 77, b"cifs.spnego;0;0;39010000;ver=0x2", b"")


@given(
    st.builds(
        Upcall, st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.binary(max_size=100), st.binary(max_size=9)
    )
)
def test_any_upcall_is_read_back_as_written(upcall: Upcall) -> None:
    assert take_upcall(pack_upcall(upcall)) == upcall


@given(st.builds(Ask, st.binary(max_size=100), st.binary(max_size=9)))
def test_any_ask_is_read_back_as_written(ask: Ask) -> None:
    assert take_ask(pack_ask(ask)) == ask


@given(st.builds(Instance, st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=99)))
def test_any_instance_is_read_back_as_written(instance: Instance) -> None:
    assert take_instance(pack_instance(instance)) == instance


@pytest.mark.parametrize(
    ("take", "whole"),
    [(take_upcall, pack_upcall(UPCALL)), (take_ask, pack_ask(Ask(b"a:host", b"ipv4")))],
    ids=["upcall", "ask"],
)
def test_a_body_cut_short_or_with_junk_behind_is_a_peer_error(take: Callable[[bytes], object], whole: bytes) -> None:
    for cut in range(len(whole)):
        with pytest.raises(PeerError):
            take(whole[:cut])
    with pytest.raises(PeerError):
        take(whole + b"\0")


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0", b"\0" * 3, b"\0" * 4 + bytes(requestkey.MAX_PAYLOAD + 1)], ids=len)
def test_an_instance_of_a_bad_size_is_a_peer_error(body: bytes) -> None:
    with pytest.raises(PeerError):
        take_instance(body)


@pytest.mark.parametrize(
    ("key", "authorisation", "size", "rest"),
    [(0, 1, 0, 0), (1, 0, 0, 0), (-1, 1, 0, 0), (1, 1, 65535, 0), (1, 1, 0, 4096)],
)
def test_an_upcall_out_of_bounds_is_a_peer_error(key: int, authorisation: int, size: int, rest: int) -> None:
    body = requestkey._UPCALL.pack(key, authorisation, size, rest) + bytes(size + rest)
    with pytest.raises(PeerError):
        take_upcall(body)


def test_a_body_that_could_not_be_read_back_is_not_packed() -> None:
    with pytest.raises(PeerError):
        pack_upcall(Upcall(1, 1, bytes(5000), b""))
    with pytest.raises(PeerError):
        pack_ask(Ask(b"", bytes(4096)))
    for wrong in (Instance(0, b""), Instance(1 << 32, b"x")):
        with pytest.raises(PeerError):
            pack_instance(wrong)


def test_the_kernels_description_of_a_key_is_read() -> None:
    found = take_described(b"cifs.spnego;0;-1;39010000;ver=0x2;host=a;b")
    assert found == ("cifs.spnego", 0, -1, 0x39010000, b"ver=0x2;host=a;b")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"cifs.spnego;0;0;39010000",
        b"cifs.spnego;x;0;39010000;",
        b"cifs.spnego;0;0;3901000;",
        b";0;0;39010000;",
        b"cifs.spnego;0;0;39010000;a\0",
        b"caf\xc3\xa9;0;0;39010000;",
        b"a" * 32 + b";0;0;39010000;",
        b"user;0;0;39010000;" + b"x" * 4096,
    ],
)
def test_a_malformed_description_of_a_key_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_described(text)


def test_a_payload_is_in_no_repr() -> None:
    assert "secret" not in repr(Instance(0, b"secret"))
