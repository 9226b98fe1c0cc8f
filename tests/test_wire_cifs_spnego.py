"""Keys of type cifs.spnego: one description, one payload, and everything that is neither."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.request_key import cifs_spnego
from upcall.protocols.request_key.cifs_spnego import Spnego, pack_payload, take_description, take_payload
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance

# As captured from a kernel of version 6.1.
WHOLE = b"ver=0x2;host=fs.lab.test;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid=0x3e9;user=alice;pid=0x164"


def test_a_kernels_description_is_read() -> None:
    assert take_description(WHOLE) == Spnego("fs.lab.test", "127.0.0.1", "krb5", 0, 1001, "alice", 356, None)


def test_optional_fields_and_those_of_newer_kernels_are_read() -> None:
    found = take_description(WHOLE.replace(b";user=alice", b"") + b";upcall_target=app")
    assert (found.user, found.target) == (None, "app")
    v6 = WHOLE.replace(b"ip4=127.0.0.1", b"ip6=0000:0000:0000:0000:0000:0000:0000:0001").replace(b"krb5", b"mskrb5")
    assert take_description(v6)[1:3] == ("0000:0000:0000:0000:0000:0000:0000:0001", "mskrb5")


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace(b"alice", b"a;creduid=0x3ea"),
        WHOLE.replace(b"alice", b"a;pid=0x1"),
        WHOLE.replace(b"alice", b"a\n"),
        WHOLE.replace(b"alice", b"\xff"),
        WHOLE.replace(b"alice", b"a;pid=0x1;upcall_target=app"),
        WHOLE.replace(b"fs.lab.test", b"fs;creduid=0x0"),
        WHOLE.replace(b"fs.lab.test", b"fs/x"),
        WHOLE.replace(b"fs.lab.test", b""),
        WHOLE.replace(b"ver=0x2", b"ver=0x3"),
        WHOLE.replace(b"0x3e9", b"0xffffffff"),
        WHOLE.replace(b"0x3e9", b"0x1000003e9"),
        WHOLE.replace(b"0x3e9", b"-1"),
        WHOLE.replace(b"0x164", b"0x0"),
        WHOLE.replace(b"0x164", b"0xffffffff"),
        WHOLE.replace(b"uid=0x0;creduid=0x3e9", b"creduid=0x3e9;uid=0x0"),
        b" " + WHOLE,
        WHOLE + b";",
        WHOLE + b"\n",
        WHOLE + b";pid=0x1",
        WHOLE * 2,
    ],
)
def test_a_description_that_no_kernel_writes_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_description(text)


def test_a_description_cut_short_is_refused_with_the_position() -> None:
    for cut in range(WHOLE.index(b"0x164") + 3):
        with pytest.raises(PeerError) as caught:
            take_description(WHOLE[:cut])
        assert caught.value.where is not None
        assert caught.value.where <= cut


@given(st.binary(max_size=200) | st.binary(max_size=9).map(lambda junk: WHOLE[:40] + junk + WHOLE[40:]))
def test_any_bytes_are_taken_or_a_peer_error(text: bytes) -> None:
    try:
        take_description(text)
    except PeerError:
        return


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=16, max_size=300))
def test_a_payload_is_read_back_and_one_of_another_length_refused(key: bytes, blob: bytes) -> None:
    payload = pack_payload(key, blob)
    assert struct.unpack_from("<4I", payload) == (2, 0, len(key), len(blob))
    assert take_payload(payload) == (key, blob)
    for wrong in (payload[:-1], payload + b"\0\0\0\0"):
        with pytest.raises(PeerError):
            take_payload(wrong)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ((2, 0, 0, 64), 64),
        ((2, 0, 15, 64), 79),
        ((2, 0, 65, 64), 129),
        ((2, 0, 32, 15), 47),
        ((2, 0, 32, 0), 32),
        ((2, 0, 32, 1000), 64),
        ((2, 0, 32, 0xFFFFFFF0), 16),
        ((2, 0, 0xFFFFFFF0, 64), 64),
        ((1, 0, 32, 64), 96),
        ((2, 1, 32, 64), 96),
    ],
)
def test_a_payload_with_bad_lengths_is_refused_and_not_shown(head: tuple[int, ...], size: int) -> None:
    with pytest.raises(PeerError) as caught:
        take_payload(struct.pack("<4I", *head) + b"s" * size)
    assert "sss" not in str(caught.value)


def test_the_broker_refuses_malformed_requests_and_answers() -> None:
    asked = pack_ask(Ask(WHOLE, b""))
    cifs_spnego.check_request(asked)
    cifs_spnego.check_answer(asked, pack_instance(Instance(0, pack_payload(bytes(16), bytes(99)))))
    with pytest.raises(PeerError):
        cifs_spnego.check_request(pack_ask(Ask(WHOLE + b"x;", b"")))
    with pytest.raises(PeerError):
        cifs_spnego.check_answer(asked, pack_instance(Instance(0, b"x")))
