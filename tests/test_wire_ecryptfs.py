"""Frames and packets of /dev/ecryptfs: byte tables, captures from a real kernel, and any bytes at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.packets import Ask, FileKey, Frame, Reply

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "ecryptfs.json").read_text())
ORIGINAL = Path(__file__).parents[2] / "shared" / "vectors" / "ecryptfs.json"
EXCHANGES = [(str(i), bytes.fromhex(e["hex"]), e.get("parsed")) for i, e in enumerate(VECTORS["exchanges"])]
PARSED = [pytest.param(frame, parsed, id=name) for name, frame, parsed in EXCHANGES if parsed]

SIGNATURE = "0123456789abcdef"
u8, u32 = st.integers(0, 0xFF), st.integers(0, 0xFFFFFFFF)
sizes = st.sampled_from([0, 1, 2, 3, 16, 67, 183, 184, 191, 192, 193, 255, 256, 447, 448, 512, 8100])
contents = st.one_of(st.binary(max_size=80), sizes.map(lambda n: bytes(n)))
signatures = st.text("0123456789abcdef", min_size=16, max_size=16)


def file_keys() -> st.SearchStrategy[FileKey]:
    fixed = st.sampled_from(sorted(wire.AES_SIZES.items())).flatmap(
        lambda pair: st.binary(min_size=pair[1], max_size=pair[1]).map(lambda key: FileKey(pair[0], key))
    )
    codes = [*sorted(wire.CIPHER_CODES - set(wire.AES_SIZES)), wire.CIPHER_OPAQUE]
    free = st.builds(FileKey, st.sampled_from(codes), st.binary(min_size=1, max_size=64))
    return st.one_of(fixed, free)


# --- byte tables ---------------------------------------------------------------------------------------------

KEY16 = bytes(range(16))
FILE_KEY = b"\x07" + KEY16 + b"\x00\x78"
TABLE: list[tuple[str, Any, Callable[[Any], bytes], Callable[[bytes], Any], bytes]] = [
    ("five bytes", Frame(102, 0x12D), wire.pack_frame, wire.take_frame, b"\x66\0\0\x01\x2d"),
    ("empty message", Frame(103, 1, 2, b""), wire.pack_frame, wire.take_frame,
     b"\x67\0\0\0\x01\x08\x02\0\0\0\0\0\0\0"),
    ("message", Frame(102, 0x01020304, 31, b"ab"), wire.pack_frame, wire.take_frame,
     b"\x66\x01\x02\x03\x04\x0a\x1f\0\0\0\x02\0\0\0ab"),
    ("two length bytes", Frame(103, 1, 0, bytes(184)), wire.pack_frame, wire.take_frame,
     b"\x67\0\0\0\x01\xc0\x00\0\0\0\0\xb8\0\0\0" + bytes(184)),
    ("tag 64", Ask(0x40, SIGNATURE, b"xyz"), wire.pack_ask, wire.take_ask,
     b"\x40\x10" + SIGNATURE.encode() + b"\x03xyz"),
    ("tag 66", Ask(0x42, SIGNATURE, b""), wire.pack_ask, wire.take_ask,
     b"\x42\x10" + SIGNATURE.encode() + b"\x00"),
    ("tag 65", Reply(0x41, 0, FILE_KEY), wire.pack_reply, wire.take_reply, b"\x41\x00\x13" + FILE_KEY),
    ("tag 65, failed", Reply(0x41, 0xFF, b""), wire.pack_reply, wire.take_reply, b"\x41\xff"),
    ("tag 67", Reply(0x43, 0, bytes(256)), wire.pack_reply, wire.take_reply, b"\x43\x00\xc0\x40" + bytes(256)),
    ("file key", FileKey(7, KEY16), wire.pack_file_key, wire.take_file_key, FILE_KEY),
]  # fmt: skip
IDS = [row[0] for row in TABLE]


@pytest.mark.parametrize(("name", "value", "pack", "take", "data"), TABLE, ids=IDS)
def test_each_value_is_packed_and_taken_as_in_the_byte_table(
    name: str, value: Any, pack: Callable[[Any], bytes], take: Any, data: bytes
) -> None:
    assert pack(value) == data
    assert take(data) == value


@pytest.mark.parametrize(("name", "value", "pack", "take", "data"), TABLE, ids=IDS)
def test_bytes_cut_short_or_too_long_are_a_peer_error(
    name: str, value: Any, pack: Any, take: Any, data: bytes
) -> None:
    for end in range(len(data)):
        if take is wire.take_frame and end == 5:
            continue  # a whole frame of its own kind
        with pytest.raises(PeerError):
            take(data[:end])
    junk = b"\0" if take is not wire.take_file_key else b"\x01"  # a zero more would be another good checksum
    with pytest.raises(PeerError):
        take(data + junk)


def test_every_packet_length_is_read_back_and_others_are_refused() -> None:
    for size in range(wire.PACKET_LENGTH_MAX + 1):
        packed = wire.pack_length(size)
        assert len(packed) == (1 if size < 192 else 2)
        assert wire.take_length(packed, 0, "it") == (size, len(packed))
    for size in (-1, -192, wire.PACKET_LENGTH_MAX + 1, 1 << 32):
        with pytest.raises(PeerError):
            wire.pack_length(size)


@pytest.mark.parametrize("tag", [0x41, 0x43])
def test_an_answer_of_every_size_is_packed_as_by_its_parts(tag: int) -> None:
    for size in range(600):
        content = bytes(size)
        assert wire.pack_success(tag, content) == bytes((tag, 0)) + wire.pack_length(size) + content


def test_two_length_bytes_cannot_say_a_small_size() -> None:
    """So there is one way only to write a size, and what was taken is what would be packed."""
    for first in range(192, 224):
        for second in (0, 1, 255):
            data = bytes((first, second))
            size, end = wire.take_length(data, 0, "it")
            assert (size >= 192, end) == (True, 2)
            assert wire.pack_length(size) == data


@pytest.mark.parametrize("first", range(224, 256))
def test_length_bytes_that_the_kernel_does_not_know_are_a_peer_error(first: int) -> None:
    with pytest.raises(PeerError):
        wire.take_length(bytes((first, 0, 0, 0, 0)), 0, "it")


@pytest.mark.parametrize(
    "signature", ["0123456789ABCDEF", "0123456789abcde", "0123456789abcdef0", "0123456789abcde\0"]
)
def test_a_malformed_signature_is_a_peer_error(signature: str) -> None:
    with pytest.raises(PeerError):
        wire.take_ask(wire.pack_ask(Ask(0x40, signature, b"x")))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x07" + KEY16 + b"\x00\x79", "checksum"),
        (b"\x06" + KEY16 + b"\x00\x78", "unknown cipher"),
        (b"\x08" + KEY16 + b"\x00\x78", "no key for cipher"),
        (b"\x02" + bytes(65) + b"\0\0", "at most 64"),
        (b"\x02\0\0", "at least 4"),
    ],
)
def test_a_malformed_file_key_is_a_peer_error(data: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        wire.take_file_key(data)


# --- captures ------------------------------------------------------------------------------------------------


def test_the_copy_of_the_vectors_is_the_original() -> None:
    if not ORIGINAL.exists():
        pytest.skip("the original is not here")
    assert json.loads(ORIGINAL.read_text()) == VECTORS


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data, _ in EXCHANGES])
def test_captured_frames_are_read_and_written_the_same(data: bytes) -> None:
    assert wire.pack_frame(wire.take_frame(data)) == data


@pytest.mark.parametrize(("data", "parsed"), PARSED)
def test_captured_packets_are_read_and_written_the_same(data: bytes, parsed: dict[str, Any]) -> None:
    frame = wire.take_frame(data)
    assert (frame.type, frame.seq, frame.index) == (parsed["type"], parsed["seq"], parsed["index"])
    assert frame.data is not None
    assert len(frame.data) == parsed["data_len"]
    if frame.type == wire.REQUEST:
        ask = wire.take_ask(frame.data)
        assert (ask.tag, ask.signature, ask.content.hex()) == (parsed["tag"], parsed["sig"], parsed["key_hex"])
        assert wire.pack_ask(ask) == frame.data
        if ask.tag == wire.TAG_66:
            assert wire.pack_file_key(wire.take_file_key(ask.content)) == ask.content
        return
    reply = wire.take_reply(frame.data)
    assert (reply.tag, reply.status) == (parsed["tag"], parsed["status"])
    assert wire.pack_reply(reply) == frame.data
    assert frame.data[2:].hex() == parsed["rest_hex"]


def test_captured_answers_pass_the_check() -> None:
    asked: dict[int, bytes] = {}
    passed = failed = 0
    for _, data, parsed in EXCHANGES:
        frame = wire.take_frame(data)
        if parsed is None or frame.data is None:
            continue
        if frame.type == wire.REQUEST:
            asked[frame.seq] = frame.data
        elif parsed["status"] == 0:
            wire.check_answer(asked[frame.seq], frame.data)
            passed += 1
        else:
            assert frame.data == wire.pack_failure(asked[frame.seq])
            with pytest.raises(PeerError, match="status"):
                wire.check_answer(asked[frame.seq], frame.data)
            failed += 1
    assert (passed, failed) == (20, 4)


def test_captured_frames_without_a_packet_are_as_ours() -> None:
    assert wire.take_frame(bytes.fromhex(VECTORS["stale_request"]["hex"])) == Frame(wire.REQUEST, 301)
    assert bytes.fromhex(VECTORS["helo_hex"]) == wire.pack_frame(Frame(wire.HELO, 0))
    assert bytes.fromhex(VECTORS["quit_hex"]) == wire.pack_frame(Frame(wire.QUIT, 0))


# --- any values, any bytes -----------------------------------------------------------------------------------


@given(u8, u32, st.none() | st.tuples(u32, contents))
def test_frames_round_trip(kind: int, seq: int, message: tuple[int, bytes] | None) -> None:
    frame = Frame(kind, seq, *(message or ()))
    assert wire.take_frame(wire.pack_frame(frame)) == frame


@given(st.builds(Ask, st.sampled_from([0x40, 0x42]), signatures, contents))
def test_asks_round_trip(ask: Ask) -> None:
    assert wire.take_ask(wire.pack_ask(ask)) == ask


@given(st.sampled_from([0x41, 0x43]), u8, contents)
def test_replies_round_trip(tag: int, status: int, content: bytes) -> None:
    reply = Reply(tag, status, b"" if status else content)
    assert wire.take_reply(wire.pack_reply(reply)) == reply


@given(file_keys())
def test_file_keys_round_trip(file_key: FileKey) -> None:
    assert wire.take_file_key(wire.pack_file_key(file_key)) == file_key


PAIRS: list[tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = [
    (wire.take_frame, wire.pack_frame),
    (wire.take_ask, wire.pack_ask),
    (wire.take_reply, wire.pack_reply),
    (wire.take_file_key, wire.pack_file_key),
]
SEEDS = [row[4] for row in TABLE] + [data for _, data, _ in EXCHANGES[:6]]


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """Something good with a byte changed, cut or added."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    at = draw(st.integers(0, len(data) - 1))
    what = draw(st.sampled_from(["change", "insert", "delete", "cut"]))
    if what == "change":
        data[at] = draw(u8)
    elif what == "insert":
        data.insert(at, draw(u8))
    elif what == "delete":
        del data[at]
    else:
        del data[at:]
    return bytes(data)


@given(nearly_right() | st.binary(max_size=300))
@example(b"\x67\0\0\0\x01\xc0\x00")
@example(b"")
def test_any_bytes_give_a_value_that_packs_to_the_same_or_a_peer_error(data: bytes) -> None:
    for take, pack in PAIRS:
        try:
            value = take(data)
        except PeerError:
            continue
        assert pack(value) == data


# --- the check that stands before the kernel -----------------------------------------------------------------

ENCRYPT = wire.pack_ask(Ask(0x42, SIGNATURE, FILE_KEY))
DECRYPT = wire.pack_ask(Ask(0x40, SIGNATURE, bytes(256)))


def wrapped(content: bytes) -> bytes:
    return wire.pack_reply(Reply(0x43, 0, content))


@pytest.mark.parametrize("size", [len(FILE_KEY), 256, 511, 512])
def test_a_wrapped_key_of_a_sound_size_passes_the_check(size: int) -> None:
    wire.check_answer(ENCRYPT, wrapped(bytes(size)))


@pytest.mark.parametrize("size", [0, 1, len(FILE_KEY) - 1, 513, 8000])
def test_a_wrapped_key_of_a_size_that_would_lose_the_file_is_refused(size: int) -> None:
    with pytest.raises(PeerError):
        wire.check_answer(ENCRYPT, wrapped(bytes(size)))


@pytest.mark.parametrize("at", [0, 1, 100, 240])
def test_a_wrapped_key_that_holds_the_key_in_clear_is_refused(at: int) -> None:
    answer = bytearray(256)
    answer[at : at + 16] = KEY16
    with pytest.raises(PeerError, match="in clear"):
        wire.check_answer(ENCRYPT, wrapped(bytes(answer)))


def test_an_answer_to_the_other_kind_of_request_is_refused() -> None:
    good_65, good_67 = wire.pack_reply(Reply(0x41, 0, FILE_KEY)), wrapped(bytes(256))
    wire.check_answer(DECRYPT, good_65)
    for asked, answer in ((DECRYPT, good_67), (ENCRYPT, good_65)):
        with pytest.raises(PeerError, match="is no answer to"):
            wire.check_answer(asked, answer)


@given(st.binary(max_size=100) | nearly_right())
def test_any_answer_passes_the_check_and_fits_a_frame_or_is_a_peer_error(answer: bytes) -> None:
    for asked in (ENCRYPT, DECRYPT):
        try:
            wire.check_answer(asked, answer)
        except PeerError:
            continue
        # What passed fits the longest frame that the kernel takes.
        assert len(wire.pack_frame(Frame(wire.RESPONSE, 0, 0, answer))) <= wire.MAX_WRITE


def accepts(check: Callable[..., object], *packets: bytes) -> bool:
    try:
        check(*packets)
    except PeerError:
        return False
    return True


@st.composite
def damaged(draw: st.DrawFn, packets: st.SearchStrategy[bytes]) -> bytes:
    """A packet with up to two bytes changed, inserted or deleted."""
    data = bytearray(draw(packets))
    for _ in range(draw(st.integers(0, 2))):
        at, what = draw(st.integers(0, max(0, len(data) - 1))), draw(st.sampled_from(["change", "insert", "delete"]))
        data[at : at + (what != "insert")] = b"" if what == "delete" else bytes((draw(u8),))
    return bytes(data)


asks = st.builds(Ask, st.sampled_from([0x40, 0x42]), signatures, contents | file_keys().map(wire.pack_file_key))
packed_asks = asks.map(wire.pack_ask)
long_contents = st.integers(0, 600).flatmap(lambda n: st.binary(min_size=n, max_size=n))


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A valid request, and an answer that is nearly right: of any size, sometimes with the key in clear."""
    asked = draw(packed_asks)
    content = draw(long_contents | contents | file_keys().map(wire.pack_file_key))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + wire.take_ask(asked).content[1:-2] + content[at:]
    reply = Reply(draw(st.sampled_from([0x41, 0x43])), 0, content[:8100])
    return asked, draw(damaged(st.just(wire.pack_reply(reply))))


@settings(max_examples=1000)
@given(answers())
@example((DECRYPT, b"\x41\0\xe6" + bytes(230)))
@example((ENCRYPT, b"\x43\0\xe6" + bytes(230)))
@example((ENCRYPT, b"\x43\0\xc0"))
def test_the_fast_check_of_answers_accepts_what_the_exact_one_does(pair: tuple[bytes, bytes]) -> None:
    asked, answer = pair
    assert accepts(wire.check_answer, asked, answer) == accepts(wire._find_fault, asked, answer)


@settings(max_examples=1000)
@given(damaged(packed_asks))
@example(b"\x40\x10" + SIGNATURE.encode() + b"\xe6" + bytes(230))
def test_a_request_passes_the_check_if_it_can_be_parsed(data: bytes) -> None:
    assert accepts(wire.check_ask, data) == accepts(wire.take_ask, data)


@given(u32, u32, contents)
def test_the_frame_of_an_answer_is_read_back(seq: int, index: int, packet: bytes) -> None:
    assert wire.take_frame(wire.pack_response_frame(seq, index, packet)) == Frame(wire.RESPONSE, seq, index, packet)


def test_the_longest_answer_that_passes_is_the_longest_that_the_kernel_takes() -> None:
    answer = wrapped(bytes(wire.MAX_WRAPPED))
    wire.check_answer(ENCRYPT, answer)
    assert len(wire.pack_frame(Frame(wire.RESPONSE, 0, 0, answer))) == wire.MAX_WRITE


@given(st.binary(max_size=8))
def test_a_failure_can_be_packed_for_any_request(asked: bytes) -> None:
    reply = wire.take_reply(wire.pack_failure(asked))
    assert reply.status == wire.STATUS_FAILED
    if asked[:1] == b"\x42":
        assert reply.tag == wire.TAG_67


def test_no_repr_shows_a_key() -> None:
    key = b"hunter2 hunter2!"
    for value in (FileKey(7, key), Ask(0x42, SIGNATURE, key), Reply(0x41, 0, key)):
        assert "hunter2" not in repr(value)
        assert key.hex() not in repr(value)
