"""Keys of type id_resolver: what a kernel asks for, what may be answered, and everything that is neither."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.played_key_type import goes_there_and_back, is_forged
from upcall.core.errors import PeerError
from upcall.protocols.request_key import id_resolver
from upcall.protocols.request_key.id_resolver import (
    MAX_EXPIRY,
    TYPE,
    Query,
    pack_description,
    pack_id,
    pack_name,
    take_description,
)
from upcall.protocols.request_key.key_types import KEY_TYPES, OF_THE_SYSTEM
from upcall.protocols.request_key.messages import MAX_ID, Ask, Described, Instance, pack_ask, pack_instance


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (b"uid:alice@lab.test", Query(False, "alice@lab.test")),
        (b"gid:staff@lab.test", Query(True, "staff@lab.test")),
        (b"uid:alice", Query(False, "alice")),
        (b"uid:a b;c:d\\e@LAB", Query(False, "a b;c:d\\e@LAB")),
        (b"uid:j\xc3\xbcrgen@lab.test", Query(False, "jürgen@lab.test")),
        (b"uid:" + b"x" * 1024, Query(False, "x" * 1024)),
        (b"user:0", Query(False, 0)),
        (b"user:1000", Query(False, 1000)),
        (b"group:4294967294", Query(True, MAX_ID)),
    ],
)
def test_a_kernels_description_is_read_and_written_the_same(text: bytes, query: Query) -> None:
    assert take_description(text) == query
    assert pack_description(query) == text


@pytest.mark.parametrize(
    "text",
    [
        b"", b":", b"uid", b"uid:", b"gid:", b"user:", b"group:", b"UID:alice", b"owner:alice", b" uid:alice",
        b"uid:a\nb", b"uid:a\0b", b"uid:\x1b[0m", b"uid:\xff@lab", b"uid:\xc0\x80", b"uid:" + b"x" * 1025,
        b"user:-1", b"user:+1", b"user:01", b"user: 1", b"user:1\n", b"user:1\0", b"user:0x1", b"user:alice",
        b"user:4294967295", b"user:9999999999", b"user:99999999999", b"user:\xd9\xa1",
    ],
)  # fmt: skip
def test_a_description_that_no_kernel_writes_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_description(text)


def test_a_request_with_a_callout_is_a_peer_error() -> None:
    id_resolver.check_request(pack_ask(Ask(b"user:1", b"")))
    with pytest.raises(PeerError):
        id_resolver.check_request(pack_ask(Ask(b"user:1", b"x")))


def check(description: bytes, payload: bytes, expiry: int = 600) -> None:
    id_resolver.check_answer(pack_ask(Ask(description, b"")), pack_instance(Instance(expiry, payload)))


@pytest.mark.parametrize(
    ("description", "payload"),
    [
        (b"uid:alice@lab.test", b"1000\0"),
        (b"gid:staff@lab.test", b"0\0"),
        (b"uid:alice@lab.test", b"4294967294\0"),
        (b"user:1000", b"alice@lab.test"),
        (b"group:50", b"LAB\\domain users@lab.test"),
        (b"user:1000", b"a@" + b"d" * 126),
    ],
)
def test_a_sound_answer_passes_with_an_expiry_in_bounds(description: bytes, payload: bytes) -> None:
    check(description, payload)
    check(description, payload, 1)
    check(description, payload, MAX_EXPIRY)
    for expiry in (0, MAX_EXPIRY + 1, 0xFFFFFFFF):
        with pytest.raises(PeerError):
            check(description, payload, expiry)


@pytest.mark.parametrize(
    "payload",
    [
        b"1000", b"4294967294", b"\0", b"0", b"1000\0\0", b"1000\n\0", b"01\0", b"-1\0", b"+1\0", b" 1\0", b"0x10\0",
        b"4294967295\0", b"12345678901\0", b"1" * 11, b"1" * 12 + b"\0", b"alice@lab.test\0", b"alice@lab.test",
    ],
)  # fmt: skip
def test_an_answer_with_a_malformed_id_is_refused(payload: bytes) -> None:
    """Without its NUL the kernel would read on in its stack."""
    with pytest.raises(PeerError):
        check(b"uid:alice@lab.test", payload)
    with pytest.raises(PeerError):
        check(b"gid:staff@lab.test", payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"1000\0", b"1000", b"alice", b"alice@", b"@lab.test", b"@", b"alice@lab.test\0", b"al\0ice@lab.test",
        b"alice@lab.test\n", b"\xff@lab.test", b"a@" + b"d" * 127, b"a@" + b"d" * 30000,
    ],
)  # fmt: skip
def test_an_answer_with_a_malformed_name_is_refused(payload: bytes) -> None:
    with pytest.raises(PeerError):
        check(b"user:1000", payload)
    with pytest.raises(PeerError):
        check(b"group:1000", payload)


@given(st.integers(-10, 1 << 33))
def test_an_id_in_bounds_passes_and_any_other_is_a_peer_error(number: int) -> None:
    if 0 <= number <= MAX_ID:
        check(b"uid:x", pack_id(number))
    else:
        with pytest.raises(PeerError):
            pack_id(number)


@given(st.text(max_size=200), st.booleans())
def test_any_name_that_is_packed_passes_and_is_read_back(name: str, group: bool) -> None:
    with contextlib.suppress(PeerError, UnicodeEncodeError):
        check(b"group:1" if group else b"user:1", pack_name(name))
    with contextlib.suppress(PeerError, UnicodeEncodeError):
        assert take_description(pack_description(Query(group, name))) == Query(group, name)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_a_peer_error(junk: bytes) -> None:
    for take in (take_description, lambda text: check(b"uid:x", text), lambda text: check(b"user:1", text)):
        with contextlib.suppress(PeerError):
            take(junk)


def test_the_systems_daemon_answers() -> None:
    """That is the machine's: names are not secret, and a name service relies on the network."""
    assert TYPE in OF_THE_SYSTEM
    assert KEY_TYPES[TYPE].service.network
    assert not KEY_TYPES[TYPE].service.local


@pytest.mark.parametrize(
    ("description", "payload", "reason"),
    [
        (b"uid:alice@lab.test", b"1000\0", "answered"),
        (b"user:1000", b"alice@lab.test", "answered"),
        (b"uid:alice@lab.test", b"1000", "bad-answer"),
        (b"uid:alice@lab.test", b"alice@lab.test", "bad-answer"),
        (b"user:1000", b"1000\0", "bad-answer"),
        (b"user:01", b"", "forged"),
    ],
)
def test_a_played_kernels_request_gets_the_daemons_answer_or_a_refusal(
    folder: Path, description: bytes, payload: bytes, reason: str
) -> None:
    goes_there_and_back(folder, Described(TYPE, 0, 0, 0x3F010000, description), payload, reason)


@pytest.mark.parametrize("key", [(1000, 0, 0x3F010000), (0, 1000, 0x3F010000), (0, 0, 0x3F3F0000)])
def test_a_key_that_the_kernel_did_not_make_is_forged(folder: Path, key: tuple[int, int, int]) -> None:
    is_forged(folder, Described(TYPE, *key, b"uid:root@lab.test"))
