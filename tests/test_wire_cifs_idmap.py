"""Keys of type cifs.idmap: what a kernel asks for, what may be answered, and everything that is neither."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.played_key_type import goes_there_and_back, is_forged
from upcall.core.errors import PeerError
from upcall.protocols.request_key import cifs_idmap
from upcall.protocols.request_key.cifs_idmap import (
    MAX_EXPIRY,
    TYPE,
    Query,
    Sid,
    pack_description,
    pack_id,
    pack_sid,
    take_description,
    take_payload_id,
    take_payload_sid,
    take_sid,
)
from upcall.protocols.request_key.key_types import KEY_TYPES, OF_THE_SYSTEM
from upcall.protocols.request_key.messages import MAX_ID, Ask, Described, Instance, pack_ask, pack_instance

DOMAIN_USER = Sid(5, (21, 1, 2, 4294967295, 1000))
FULL = Sid(5, tuple(range(15)))


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (b"os:S-1-5-21-1-2-4294967295-1000", Query(False, DOMAIN_USER)),
        (b"gs:S-1-5-32-544", Query(True, Sid(5, (32, 544)))),
        (b"gs:S-1-1-0", Query(True, Sid(1, (0,)))),
        (b"os:S-1-5", Query(False, Sid(5, ()))),
        (b"os:S-1-0x100000000-1", Query(False, Sid(1 << 32, (1,)))),
        (b"os:S-1-4294967295", Query(False, Sid(0xFFFFFFFF, ()))),
        (b"os:S-1-5-0-1-2-3-4-5-6-7-8-9-10-11-12-13-14", Query(False, FULL)),
        (b"oi:0", Query(False, 0)),
        (b"gi:4294967294", Query(True, MAX_ID)),
    ],
)
def test_a_kernels_description_is_read_and_written_the_same(text: bytes, query: Query) -> None:
    assert take_description(text) == query
    assert pack_description(query) == text


@pytest.mark.parametrize(
    "text",
    [
        b"", b":", b"os", b"os:", b"gs:", b"oi:", b"gi:", b"xs:S-1-5", b"OS:S-1-5", b"os:s-1-5", b"os:S-2-5",
        b"os:S-1", b"os:S-1-", b"os:S-1-5-", b"os:S-1-5--1", b"os:S-1-05", b"os:S-1-5-01", b"os:S-1-5-4294967296",
        b"os:S-1-4294967296", b"os:S-1-0x5", b"os:S-1-0x0100000000", b"os:S-1-0x1000000000000", b"os:S-1-0xABCDEF012",
        b"os:S-1-5" + b"-1" * 16, b"os:S-1-5\n", b"os:S-1-5-1\0", b"os:S-1-5 ", b"os:alice", b"os:S-1-5-\xd9\xa1",
        b"oi:-1", b"oi:01", b"oi:4294967295", b"oi:99999999999", b"oi:x", b"oi:1\n", b"oi:S-1-5",
    ],
)  # fmt: skip
def test_a_description_that_no_kernel_writes_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_description(text)


def test_a_request_with_a_callout_is_a_peer_error() -> None:
    cifs_idmap.check_request(pack_ask(Ask(b"oi:1", b"")))
    with pytest.raises(PeerError):
        cifs_idmap.check_request(pack_ask(Ask(b"oi:1", b"x")))


def test_a_sid_is_packed_as_the_kernels_struct() -> None:
    payload = bytes.fromhex("0105000000000005 15000000 01000000 02000000 ffffffff e8030000") + bytes(40)
    assert pack_sid(DOMAIN_USER) == payload
    assert take_payload_sid(payload) == DOMAIN_USER


def check(description: bytes, payload: bytes, expiry: int = 600) -> None:
    cifs_idmap.check_answer(pack_ask(Ask(description, b"")), pack_instance(Instance(expiry, payload)))


@pytest.mark.parametrize(
    ("description", "payload"),
    [
        (b"os:S-1-5-21-1-2-3-1000", pack_id(1000)),
        (b"gs:S-1-5-32-544", pack_id(MAX_ID)),
        (b"oi:1000", pack_sid(DOMAIN_USER)),
        (b"gi:1000", pack_sid(FULL)),
        (b"gi:1000", pack_sid(Sid((1 << 48) - 1, ()))),
    ],
)
def test_a_sound_answer_passes_with_an_expiry_in_bounds(description: bytes, payload: bytes) -> None:
    check(description, payload)
    check(description, payload, 1)
    check(description, payload, MAX_EXPIRY)
    for expiry in (0, MAX_EXPIRY + 1):
        with pytest.raises(PeerError):
            check(description, payload, expiry)


GOOD = pack_sid(DOMAIN_USER)


@pytest.mark.parametrize("payload", [b"\1", bytes(3), bytes(5), bytes(8), b"\xff" * 4, b"1000\0", GOOD])
def test_an_answer_with_a_malformed_id_is_refused(payload: bytes) -> None:
    for description in (b"os:S-1-5-21-1-2-3-1000", b"gs:S-1-5-32-544"):
        with pytest.raises(PeerError):
            check(description, payload)


@pytest.mark.parametrize(
    "payload",
    [
        bytes(4), b"\1" + bytes(7), GOOD[:-1], GOOD + b"\0", GOOD[:28], b"\0" + GOOD[1:], b"\2" + GOOD[1:],
        GOOD[:1] + b"\x10" + GOOD[2:], GOOD[:1] + b"\xff" + GOOD[2:], GOOD[:1] + b"\4" + GOOD[2:],
        GOOD[:-1] + b"\1", b"S-1-5-21-1-2-3-1000", bytes(68), bytes(32767),
    ],
    ids=range(14),
)  # fmt: skip
def test_an_answer_with_a_malformed_sid_is_refused(payload: bytes) -> None:
    """Among them: a count larger than the payload, and bytes of the kernel's memory behind the SID."""
    for description in (b"oi:1000", b"gi:1000"):
        with pytest.raises(PeerError):
            check(description, payload)


sids = st.builds(Sid, st.integers(0, (1 << 48) - 1), st.lists(st.integers(0, 0xFFFFFFFF), max_size=15).map(tuple))


@given(sids, st.booleans())
def test_any_sid_is_read_back_as_written(sid: Sid, group: bool) -> None:
    assert take_payload_sid(pack_sid(sid)) == sid
    assert take_sid(str(sid).encode()) == sid
    query = Query(group, sid)
    assert take_description(pack_description(query)) == query


@pytest.mark.parametrize(
    "sid", [Sid(-1, ()), Sid(1 << 48, ()), Sid(5, (1,) * 16), Sid(5, (-1,)), Sid(5, (1 << 32,))], ids=range(5)
)
def test_a_sid_out_of_bounds_is_a_peer_error(sid: Sid) -> None:
    with pytest.raises(PeerError):
        pack_sid(sid)


@given(st.integers(-10, 1 << 33))
def test_an_id_in_bounds_is_read_back_and_any_other_is_a_peer_error(number: int) -> None:
    if 0 <= number <= MAX_ID:
        assert take_payload_id(pack_id(number)) == number
        assert pack_id(number) == struct.pack("=I", number)
    else:
        with pytest.raises(PeerError):
            pack_id(number)


@given(st.binary(max_size=100))
def test_any_bytes_are_taken_or_a_peer_error(junk: bytes) -> None:
    for take in (take_description, take_sid, take_payload_id, take_payload_sid):
        with contextlib.suppress(PeerError):
            take(junk)


def test_the_systems_daemon_answers() -> None:
    """That is the machine's: winbind repeats what a domain controller says."""
    assert TYPE in OF_THE_SYSTEM
    assert KEY_TYPES[TYPE].service.network
    assert not KEY_TYPES[TYPE].service.local


@pytest.mark.parametrize(
    ("description", "payload", "reason"),
    [
        (b"os:S-1-5-21-1-2-3-1000", pack_id(1000), "answered"),
        (b"oi:1000", GOOD, "answered"),
        (b"os:S-1-5-21-1-2-3-1000", GOOD, "bad-answer"),
        (b"oi:1000", pack_id(1000), "bad-answer"),
        (b"oi:01", b"", "forged"),
    ],
)
def test_a_played_kernels_request_gets_the_daemons_answer_or_a_refusal(
    folder: Path, description: bytes, payload: bytes, reason: str
) -> None:
    goes_there_and_back(folder, Described(TYPE, 0, 0, 0x39010000, description), payload, reason)


@pytest.mark.parametrize("key", [(1000, 0, 0x39010000), (0, 1000, 0x39010000), (0, 0, 0x393F0000)])
def test_a_key_that_the_kernel_did_not_make_is_forged(folder: Path, key: tuple[int, int, int]) -> None:
    is_forged(folder, Described(TYPE, *key, b"os:S-1-5-18"))
