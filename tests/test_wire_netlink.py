"""The netlink messages: byte tables, any bytes, and pyroute2 as the oracle for our headers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import nlmsg  # type: ignore[import-untyped]

from upcall.core.errors import REASONS, PeerError
from upcall.core.messages import Answer, Refusal, Requester
from upcall.wire import envelope as wire
from upcall.wire.envelope import Envelope, NetlinkMessage, Response

u16, u32, u64 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)
bodies = st.binary(max_size=100) | st.sampled_from([bytes(wire.MAX_BODY), b""])
names = st.text(st.characters(max_codepoint=127), min_size=1, max_size=wire.MAX_NAME)
envelopes = st.builds(Envelope, u32, u32, names, st.builds(Requester, u32, u32), u64, bodies, st.booleans())
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=wire.MAX_REASON)
whys = st.text(st.characters(exclude_categories=("C", "Z")), max_size=wire.MAX_WHY // 4)
outcomes = st.builds(Answer, bodies) | st.builds(Refusal, printable | st.sampled_from(sorted(REASONS)), u16, whys)

REQUEST = Envelope(7, 3, "key", Requester(1000, 42), 9, b"body")
TABLE: list[tuple[str, Any, Callable[[Any], bytes], Callable[[bytes], Any], bytes]] = [
    ("helo", NetlinkMessage(100, 0), wire.pack_message, wire.take_message, struct.pack("=IHHII", 16, 100, 0, 0, 0)),
    ("quit", NetlinkMessage(101, 5, 0, None, 1, 2), wire.pack_message, wire.take_message,
     struct.pack("=IHHII", 16, 101, 1, 5, 2)),
    ("empty", NetlinkMessage(102, 1, 2, b""), wire.pack_message, wire.take_message,
     struct.pack("=IHHIIII", 24, 102, 0, 1, 0, 2, 0)),
    ("message", NetlinkMessage(103, 1, 2, b"abc"), wire.pack_message, wire.take_message,
     struct.pack("=IHHIIII", 27, 103, 0, 1, 0, 2, 3) + b"abc"),
    ("request", REQUEST, wire.pack_request, wire.take_request,
     struct.pack("=IHHIIII", 51, 102, 0, 7, 0, 3, 27)
     + struct.pack("=BBHIIQ", 1, 3, 0, 1000, 42, 9) + b"keybody"),
    ("request that wants a why", REQUEST._replace(wants_why=True), wire.pack_request, wire.take_request,
     struct.pack("=IHHIIII", 51, 102, 0, 7, 0, 3, 27)
     + struct.pack("=BBHIIQ", 1, 3, 1, 1000, 42, 9) + b"keybody"),
    ("answer", Response(7, 3, Answer(b"it")), lambda r: wire.pack_response(*r), wire.take_response,
     struct.pack("=IHHIIII", 30, 103, 0, 7, 0, 3, 6) + struct.pack("=BBH", 1, 0, 0) + b"it"),
    ("refusal", Response(7, 3, Refusal("timed-out", 110)), lambda r: wire.pack_response(*r), wire.take_response,
     struct.pack("=IHHIIII", 37, 103, 0, 7, 0, 3, 13) + struct.pack("=BBH", 1, 1, 110) + b"timed-out"),
    ("refusal with a why", Response(7, 3, Refusal("locked", 128, "à 10:04")), lambda r: wire.pack_response(*r),
     wire.take_response,
     struct.pack("=IHHIIII", 43, 103, 0, 7, 0, 3, 19) + struct.pack("=BBH", 1, 1, 128) + b"locked\0\xc3\xa0 10:04"),
]  # fmt: skip
IDS = [row[0] for row in TABLE]


@pytest.mark.parametrize(("name", "value", "pack", "take", "data"), TABLE, ids=IDS)
def test_each_value_is_packed_and_taken_as_in_the_byte_table(
    name: str, value: Any, pack: Any, take: Any, data: bytes
) -> None:
    assert pack(value) == data
    assert take(data) == value


@pytest.mark.parametrize(("name", "value", "pack", "take", "data"), TABLE, ids=IDS)
def test_bytes_cut_short_or_too_long_are_a_peer_error(
    name: str, value: Any, pack: Any, take: Any, data: bytes
) -> None:
    for end in range(len(data)):
        with pytest.raises(PeerError):
            take(data[:end])
    for junk in (b"\0", b"\0\0\0\0", data):
        with pytest.raises(PeerError):
            take(data + junk)


@given(st.integers(0, 0xFFFF), u32, u32, st.none() | bodies, u16, u32)
def test_messages_round_trip(kind: int, seq: int, index: int, data: bytes | None, flags: int, pid: int) -> None:
    with_message = kind in (wire.REQUEST, wire.RESPONSE, wire.NOTICE)
    if not with_message:
        data = None
    message = NetlinkMessage(
        kind, seq, index if with_message else 0, data or b"" if with_message else None, flags, pid
    )
    assert wire.take_message(wire.pack_message(message)) == message


@given(envelopes, st.sampled_from([wire.REQUEST, wire.NOTICE]))
def test_requests_round_trip(envelope: Envelope, kind: int) -> None:
    data = wire.pack_request(envelope, kind)
    assert len(data) <= wire.MAX_MESSAGE
    taken = wire.take_request(data)
    assert taken == envelope
    assert (type(taken), type(taken.requester)) == (Envelope, Requester)
    assert wire.take_message(data).data is not None


@given(u32, u32, outcomes)
def test_responses_round_trip(seq: int, index: int, outcome: Answer | Refusal) -> None:
    data = wire.pack_response(seq, index, outcome)
    assert len(data) <= wire.MAX_MESSAGE
    assert wire.take_response(data) == Response(seq, index, outcome)
    assert wire.response_position(data) == (seq, index)


@given(st.text(max_size=80), st.integers(-5, 1 << 20))
def test_a_refusal_with_any_reason_and_code_can_be_read_back(reason: str, code: int) -> None:
    outcome = wire.take_response(wire.pack_response(1, 2, Refusal(reason, code))).outcome
    assert isinstance(outcome, Refusal)


@given(st.text(max_size=300))
def test_a_why_is_sent_as_a_short_printable_text(why: str) -> None:
    outcome = wire.take_response(wire.pack_response(1, 2, Refusal("locked", 128, why))).outcome
    assert isinstance(outcome, Refusal)
    assert outcome[:2] == ("locked", 128)
    assert outcome.why.isprintable()
    assert len(outcome.why.encode()) <= wire.MAX_WHY
    if why.isprintable() and len(why.encode()) <= wire.MAX_WHY:
        assert outcome.why == why


@pytest.mark.parametrize(
    "why",
    [
        b"",
        b"x" * (wire.MAX_WHY + 1),
        b"\x1b[2J",
        b"one\ntwo",
        b"\x9b2J",
        b"nul\0",
        b"\xc3",
        "\x9b2J".encode(),
        "\u202etfel ot thgir".encode(),
        "\u2066isolated".encode(),
        "zero\u200bwidth".encode(),
        "\ufeffmark".encode(),
        "line\u2028separator".encode(),
        "\ue000private".encode(),
        "\U000e0041tag".encode(),
        b"\xed\xa0\x80",
    ],
    ids=lambda why: ascii(why[:12]),
)
def test_a_why_that_could_fool_a_terminal_is_a_peer_error(why: bytes) -> None:
    body = b"locked\0" + why
    head = struct.pack("=IHHIIIIBBH", 28 + len(body), 103, 0, 1, 0, 2, 4 + len(body), 1, 1, 128)
    with pytest.raises(PeerError, match="why"):
        wire.take_response(head + body)


def test_an_unknown_reason_is_kept() -> None:
    data = wire.pack_response(1, 2, Refusal("moon-phase", 999))
    assert wire.take_response(data).outcome == Refusal("moon-phase", 999)


def masked_request(data: bytes) -> bytes:
    """Without what is ignored: nlmsg_type, nlmsg_flags, nlmsg_pid, the envelope's flags but the lowest one."""
    flags = struct.pack("=H", struct.unpack_from("=H", data, 26)[0] & 1)
    return data[:4] + struct.pack("=HH", wire.REQUEST, 0) + data[8:12] + bytes(4) + data[16:26] + flags + data[28:]


def masked_response(data: bytes) -> bytes:
    """Without nlmsg_flags and nlmsg_pid; any status but 0 is a refusal, and 0 has no errno."""
    status = min(data[25], 1)
    code = data[26:28] if status else bytes(2)
    return data[:6] + bytes(2) + data[8:12] + bytes(4) + data[16:25] + bytes((status,)) + code + data[28:]


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from([row[4] for row in TABLE])))
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        struct.pack_into("=I", data, 0, len(data))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data)


@given(nearly_right() | st.binary(max_size=120))
def test_any_bytes_give_a_value_that_packs_to_the_same_or_a_peer_error(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert wire.pack_message(wire.take_message(data)) == data
    with contextlib.suppress(PeerError):
        assert wire.pack_request(wire.take_request(data)) == masked_request(data)
    with contextlib.suppress(PeerError):
        response = wire.take_response(data)
        assert wire.pack_response(*response) == masked_response(data)
        assert wire.response_position(data) == response[:2]
        head = wire.response_head(data)
        assert (head[3], head[5], wire.take_outcome(head, data)) == response


@given(st.binary(max_size=40))
def test_a_position_is_read_from_any_bytes_that_are_long_enough(data: bytes) -> None:
    head = wire.response_head(data)
    assert bool(head) == (len(data) >= 28)
    if head:
        assert (head[3], head[5]) == wire.response_position(data)
    if len(data) < 24:
        with pytest.raises(PeerError):
            wire.response_position(data)
    else:
        assert wire.response_position(data) == (
            struct.unpack_from("=I", data, 8)[0],
            struct.unpack_from("=I", data, 16)[0],
        )


@pytest.mark.parametrize(
    "write",
    [
        lambda: wire.pack_request(REQUEST._replace(service="")),
        lambda: wire.pack_request(REQUEST._replace(service="x" * 65)),
        lambda: wire.pack_request(REQUEST._replace(body=bytes(wire.MAX_BODY + 1))),
        lambda: wire.pack_response(1, 1, Answer(bytes(wire.MAX_BODY + 1))),
    ],
    ids=["no service", "a long service", "a long body", "a long answer"],
)
def test_names_and_bodies_out_of_bounds_are_not_packed(write: Callable[[], bytes]) -> None:
    with pytest.raises(PeerError):
        write()


def test_every_known_reason_has_a_refusal() -> None:
    for reason, code in REASONS.items():
        assert wire.refusal(reason) == Refusal(reason, code)
        assert 0 < code < 1 << 16


def test_the_repr_does_not_show_the_body() -> None:
    assert "hunter2" not in repr(REQUEST._replace(body=b"hunter2"))


# --- pyroute2 as the oracle ----------------------------------------------------------------------------------


class Oracle(nlmsg):  # type: ignore[misc]  # untyped
    """`struct ecryptfs_message` in pyroute2's words."""

    fields = (("index", "I"), ("data_len", "I"))


class HeaderOnly(nlmsg):  # type: ignore[misc]  # untyped
    fields = ()


@pytest.mark.parametrize(
    ("data", "kind", "seq", "pid", "index"),
    [
        (wire.pack_control(wire.HELO), 100, 0, 0, None),
        (wire.pack_control(wire.QUIT, 77), 101, 77, 0, None),
        (wire.pack_message(NetlinkMessage(103, 8, 5, b"x", 3, 4711)), 103, 8, 4711, 5),
        (wire.pack_request(REQUEST), 102, 7, 0, 3),
        (wire.pack_request(REQUEST._replace(body=b"odd"), wire.NOTICE), 104, 7, 0, 3),
        (wire.pack_response(7, 31, Answer(b"it")), 103, 7, 0, 31),
        (wire.pack_response(7, 31, wire.refusal("busy")), 103, 7, 0, 31),
    ],
)
def test_pyroute2_reads_our_headers(data: bytes, kind: int, seq: int, pid: int, index: int | None) -> None:
    message = HeaderOnly(data) if index is None else Oracle(data)
    message.decode()
    header = message["header"]
    assert (header["length"], header["type"]) == (len(data), kind)
    assert (header["sequence_number"], header["pid"]) == (seq, pid)
    if index is not None:
        assert message["index"] == index
        assert message["data_len"] == len(data) - 24


def test_pyroute2_writes_what_we_read() -> None:
    message = Oracle()
    message["header"].update({"type": 103, "sequence_number": 9, "pid": 1, "flags": 2})
    message["index"], message["data_len"] = 4, 0
    message.encode()
    assert wire.take_message(bytes(message.data)) == NetlinkMessage(103, 9, 4, b"", 2, 1)


def test_our_fixed_parts_are_aligned() -> None:
    """NLMSG_ALIGN is 4: what follows nlmsghdr and struct ecryptfs_message begins aligned."""
    assert (
        wire.HEADER.size % 4 == wire.MESSAGE.size % 4 == wire.REQUEST_HEAD.size % 4 == wire.RESPONSE_HEAD.size % 4 == 0
    )
