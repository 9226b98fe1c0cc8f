"""The kernel's quota warnings: whole, cut short, with more and with less than we know."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.quota.warning import MEANING, Sequence, Warned, messages, pack, take, take_attributes

# What Linux 6.1 sent when uid 5001 met the hard limit of space on device 7:0.
SEEN = bytes.fromhex(
    "4c000000 1c000000 2a000000 00000000 01010000 08000100 00000000 0c000200 8913000000000000"
    "08000300 04000000 08000400 07000000 08000500 00000000 0c000600 8913000000000000"
)
ALICE = Warned(0, 5001, 4, 7, 0, 5001)

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
warned = st.builds(Warned, u32, u64, u32, u32, u32, u64)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def with_attributes(data: bytes) -> bytes:
    return struct.pack("=IHHII", 20 + len(data), 28, 0, 42, 0) + bytes((1, 1, 0, 0)) + data


def test_a_captured_warning_is_read_and_written_the_same() -> None:
    assert take(SEEN) == ALICE
    assert pack(ALICE, 28, 42) == SEEN
    assert take_attributes(SEEN[20:]) == ALICE


@given(warned, u32)
def test_any_warning_is_read_back_as_written(one: Warned, seq: int) -> None:
    (message,) = messages(pack(one, 28, seq))
    assert (message.type, message.seq) == (28, seq)
    assert take(message.data) == one


def test_a_warning_cut_short_anywhere_is_refused() -> None:
    for size in range(len(SEEN)):
        with pytest.raises(PeerError):
            take(SEEN[:size])
        if size:
            with pytest.raises(PeerError):
                list(messages(SEEN[:size]))


@given(st.binary(max_size=120))
def test_any_bytes_are_taken_or_a_peer_error(data: bytes) -> None:
    for decode in (take, take_attributes, lambda bytes_: list(messages(bytes_))):
        with contextlib.suppress(PeerError):
            decode(data)


def test_all_ten_warnings_have_a_meaning() -> None:
    assert sorted(MEANING) == list(range(1, 11))


def test_unknown_warnings_and_types_are_kept() -> None:
    strange = Warned(9, 5001, 77, 7, 0, 5001)
    assert take(pack(strange, 28, 1)) == strange


def test_unknown_attributes_are_skipped() -> None:
    more = attribute(7, b"") + attribute(99, b"abc") + SEEN[20:] + attribute(0x4000 | 50, bytes(8))
    assert take(with_attributes(more)) == ALICE


def test_a_missing_attribute_is_refused() -> None:
    with pytest.raises(PeerError, match="without attribute 6"):
        take(with_attributes(SEEN[20:-12]))


def test_an_attribute_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(PeerError, match="attribute 2 has 4 bytes"):
        take(with_attributes(attribute(2, bytes(4))))


def test_impossible_lengths_are_refused() -> None:
    for length in (0, 3, 9, 0xFFFF):
        with pytest.raises(PeerError):
            take(with_attributes(struct.pack("=HH", length, 1) + bytes(4)))
    for length in (0, 15, 77, 0xFFFFFFFF):
        with pytest.raises(PeerError):
            list(messages(struct.pack("=I", length) + SEEN[4:]))


def test_another_command_is_refused() -> None:
    with pytest.raises(PeerError, match="command 2"):
        take(SEEN[:16] + b"\x02" + SEEN[17:])


def test_several_messages_in_a_datagram_are_taken() -> None:
    odd = pack(ALICE, 28, 2) + attribute(99, b"x")
    odd = struct.pack("=I", len(odd) - 3) + odd[4:]  # its padding does not count
    found = list(messages(SEEN + odd + pack(ALICE, 28, 3)))
    assert [message.seq for message in found] == [42, 2, 3]
    assert [len(message.data) for message in found] == [76, 81, 76]
    assert [take(message.data) for message in found] == [ALICE] * 3


# --- the sequence --------------------------------------------------------------------------------------------


def lost(*numbers: int) -> int:
    sequence = Sequence()
    for number in numbers:
        sequence(number)
    return sequence.lost


def test_consecutive_numbers_count_nothing_as_lost() -> None:
    assert lost() == lost(7) == lost(7, 8, 9) == 0


def test_gaps_in_the_numbers_count_as_lost() -> None:
    assert lost(7, 9) == 1
    assert lost(7, 107, 108, 118) == 99 + 9


def test_gaps_are_counted_across_a_wrap_of_the_counter() -> None:
    assert lost(0xFFFFFFFF, 0) == 0
    assert lost(0xFFFFFFFE, 1) == 2


def test_numbers_in_another_order_count_nothing_as_lost() -> None:
    assert lost(7, 9, 8, 10) == 0
    assert lost(0xFFFFFFFF, 1, 0, 2) == 0


def test_a_number_from_before_the_first_counts_nothing_as_lost() -> None:
    assert lost(7, 6, 8) == 0


@given(st.permutations(range(1, 20)), st.sets(st.integers(1, 19)))
def test_missing_numbers_are_counted_in_any_order(order: list[int], missing: set[int]) -> None:
    come = [number for number in order if number not in missing]
    assert lost(0, *come, 20) == len(missing)
