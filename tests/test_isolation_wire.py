"""The messages between the daemon and an isolated module: whole, cut short, too long, and garbage."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upcall.core.errors import PeerError, Refused
from upcall.wire import isolation as wire
from upcall.wire.isolation import ChildMessage

KINDS = sorted(wire.REQUESTS | wire.OUTCOMES | wire.QUESTIONS)
U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
GOLDEN = [
    (ChildMessage(wire.OPEN, 1, 7, 0, "ab", b"xyz"), "01 01 0000 01000000 07000000 02000000 6162 78797a"),
    (ChildMessage(wire.ANSWER, 2, 0, 3), "01 10 0300 02000000 00000000 00000000"),
    (ChildMessage(wire.REFUSED, 0xFFFFFFFF, 0, 11, "locked"), "01 11 0b00 ffffffff 00000000 06000000 6c6f636b6564"),
    (
        ChildMessage(wire.REFUSED, 1, 0, 11, "locked", b"why"),
        "01 11 0b00 01000000 00000000 06000000 6c6f636b6564 776879",
    ),
    (ChildMessage(wire.PIN, 3, 0, 0, "t", b"PIN?"), "01 21 0000 03000000 00000000 01000000 74 50494e3f"),
]


@pytest.mark.parametrize(("message", "data"), GOLDEN)
def test_messages_have_exactly_these_bytes_and_a_cut_one_is_refused(message: ChildMessage, data: str) -> None:
    whole = bytes.fromhex(data)
    assert bytes(wire.pack(message)) == whole
    assert wire.take(whole) == message
    for size in range(wire.HEAD.size + len(message.text.encode())):
        with pytest.raises(PeerError):
            wire.take(whole[:size])


@given(st.sampled_from(KINDS), U32, U32, U16, st.text(max_size=80), st.binary(max_size=80))
def test_every_message_that_packs_reads_back_the_same(
    kind: int, number: int, handle: int, code: int, text: str, data: bytes
) -> None:
    message = ChildMessage(kind, number, handle, code, text, data)
    try:
        packed = wire.pack(message)
    except PeerError:
        return
    assert wire.take(memoryview(packed)) == message


@given(
    st.binary(max_size=120)
    | st.builds(lambda kind, rest: bytes([1, kind]) + rest, st.sampled_from(KINDS), st.binary())
)
@example(b"\x01\x12" + bytes(2 + 4 + 4) + b"\xff\xff\xff\xff")
def test_garbage_is_refused_or_packs_to_the_same_bytes(data: bytes) -> None:
    try:
        message = wire.take(data)
    except PeerError:
        return
    assert bytes(wire.pack(message)) == data


@pytest.mark.parametrize(
    "message",
    [
        ChildMessage(99, 1),
        ChildMessage(wire.WRAP, 1, 1, 1),  # no place for a code
        ChildMessage(wire.ANSWER, 1, 1),  # for a handle
        ChildMessage(wire.WRAP, 1, 1, 0, "x"),
        ChildMessage(wire.FAILED, 1, 0, 0, "x", b"x"),
        ChildMessage(wire.FAILED, 1, 0, 0, "x" * (wire.MAX_TEXT + 1)),
        ChildMessage(wire.FAILED, 1, 0, 0, "\ud800"),
        ChildMessage(wire.WRAP, 1, 1, 0, "", bytes(wire.MAX_DATA + 1)),
        ChildMessage(wire.WRAP, 1 << 32),
        ChildMessage(wire.REFUSED, 1, 0, 1 << 16, "x"),
    ],
    ids=[
        "unknown kind",
        "code in WRAP",
        "ANSWER without a handle",
        "text in WRAP",
        "data in FAILED",
        "text too long",
        "surrogate in text",
        "data too long",
        "number too large",
        "code too large",
    ],
)
def test_a_message_with_invalid_fields_is_not_packed(message: ChildMessage) -> None:
    with pytest.raises(PeerError):
        wire.pack(message)


def test_the_longest_message_packs_and_reads_back() -> None:
    message = ChildMessage(wire.OPEN, 1, 1, 0, "x" * wire.MAX_TEXT, bytes(wire.MAX_DATA))
    packed = wire.pack(message)
    assert len(packed) == wire.MAX_MESSAGE
    assert wire.take(packed) == message


def test_repr_of_a_message_hides_its_data() -> None:
    assert "hunter2" not in repr(ChildMessage(wire.ANSWER, 1, 0, 0, "", b"hunter2"))


@given(st.text())
@example("\ud800" + "\u20ac" * wire.MAX_TEXT)
def test_any_text_is_cut_to_fit_a_message(text: str) -> None:
    wire.pack(ChildMessage(wire.FAILED, 1, 0, 0, wire.fitting(text)))


@pytest.mark.parametrize("why", ["", "the token has locked itself", "é" * wire.MAX_TEXT, "\udcff"])
def test_a_refusal_keeps_its_reason_errno_and_why(why: str) -> None:
    refused = wire.refused_of(wire.take(wire.pack(wire.refused_message(3, Refused("locked", 7, why)))))
    assert (refused.reason, refused.errno) == ("locked", 7)
    assert refused.why == wire.fitting(why)
