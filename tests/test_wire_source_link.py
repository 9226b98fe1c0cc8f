"""The messages between broker and sources: whole, cut short, with more than there may be."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.core.messages import Answer, Requester
from upcall.wire.envelope import (
    HEADER,
    MAX_BODY,
    MESSAGE,
    NOTICE,
    REQUEST,
    RESPONSE,
    Envelope,
    Response,
    pack_control,
    pack_request,
    pack_response,
)
from upcall.wire.source_link import (
    MAX_STATUS,
    MAX_TARGETED,
    MOST_UIDS,
    REGISTERED,
    STATUS,
    UNREGISTERED,
    FromSource,
    Registrations,
    pack_from_source,
    pack_registrations,
    pack_status,
    take_from_source,
    take_status,
    take_to_source,
    type_of,
)

u32 = st.integers(0, (1 << 32) - 1)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
envelopes = st.builds(
    Envelope, u32, u32, names, st.builds(Requester, u32, u32), st.integers(0, (1 << 64) - 1), st.binary(max_size=80)
)


@given(st.sampled_from([REQUEST, NOTICE]), u32, envelopes)
def test_a_sources_message_is_read_back_and_one_of_another_length_refused(
    kind: int, target: int, envelope: Envelope
) -> None:
    message = FromSource(kind, target, envelope)
    data = pack_from_source(message)
    assert take_from_source(data) == message
    assert type_of(data) == kind
    for size in range(len(data)):
        with pytest.raises(PeerError):
            take_from_source(data[:size])
    with pytest.raises(PeerError):
        take_from_source(data + b"x")


def test_the_longest_body_is_read_back_and_a_longer_one_is_not_packed() -> None:
    longest = Envelope(1, 0, "quota", Requester(0, 0), 0, bytes(MAX_TARGETED))
    assert take_from_source(pack_from_source(FromSource(NOTICE, 7, longest))).envelope == longest
    with pytest.raises(PeerError):
        pack_from_source(FromSource(NOTICE, 7, longest._replace(body=bytes(MAX_TARGETED + 1))))


def test_a_message_without_a_target_is_refused() -> None:
    for size in range(4):
        with pytest.raises(PeerError, match="ends before its target"):
            take_from_source(pack_request(Envelope(1, 0, "quota", Requester(0, 0), 0, bytes(size)), NOTICE))


@pytest.mark.parametrize("data", [b"", bytes(15), pack_control(100), pack_response(1, 0, Answer(b"")), bytes(80)])
def test_a_message_that_sources_do_not_send_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        take_from_source(data)


def test_a_status_is_read_back_and_one_too_long_refused() -> None:
    said = {"listening": True, "why": "", "filesystems": ["/home"]}
    message = take_from_source(pack_status("quota", 3, said))
    assert (message.kind, message.target, message.envelope.service, message.envelope.seq) == (STATUS, 0, "quota", 3)
    assert take_status(message.envelope.body) == said
    with pytest.raises(PeerError):
        pack_status("quota", 0, {"x": "y" * MAX_STATUS})
    long = pack_request(Envelope(0, 0, "quota", Requester(0, 0), 0, bytes(MAX_STATUS + 1)), STATUS)
    with pytest.raises(PeerError, match="status of"):
        take_from_source(long)


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b'{"x": NaN}', b"\xff", b"[" * 8000])
def test_a_malformed_status_is_a_peer_error(body: bytes) -> None:
    with pytest.raises(PeerError):
        take_status(body)


@given(st.lists(u32, max_size=9), st.sampled_from([REGISTERED, UNREGISTERED]))
def test_registrations_are_read_back_as_written(uids: list[int], kind: int) -> None:
    found = [take_to_source(data) for data in pack_registrations(kind, uids)]
    assert found == ([Registrations(kind, tuple(uids))] if uids else [])


def test_a_whole_list_is_sent_even_if_empty_and_may_take_several_messages() -> None:
    assert [take_to_source(data) for data in pack_registrations(REGISTERED, [], whole=True)] == [
        Registrations(REGISTERED, (), whole=True)
    ]
    many = range(2 * MOST_UIDS + 1)
    found = [take_to_source(data) for data in pack_registrations(REGISTERED, many, whole=True)]
    assert all(isinstance(one, Registrations) for one in found)
    assert [one.whole for one in found if isinstance(one, Registrations)] == [True, False, False]
    assert [uid for one in found if isinstance(one, Registrations) for uid in one.uids] == list(many)


def registrations(kind: int, index: int, size: int, data: bytes) -> bytes:
    return HEADER.pack(HEADER.size + MESSAGE.size + len(data), kind, 0, 0, 0) + MESSAGE.pack(index, size) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pack_control(REGISTERED),
        registrations(REGISTERED, 0, 4, bytes(8)),
        registrations(REGISTERED, 0, 3, bytes(3)),
        registrations(REGISTERED, 2, 4, bytes(4)),
        registrations(UNREGISTERED, 1, 4, bytes(4)),
        registrations(REGISTERED, 0, 4 * MOST_UIDS + 4, bytes(4 * MOST_UIDS + 4)),
        registrations(NOTICE, 0, 4, bytes(4)),
        registrations(RESPONSE, 0, 4, bytes(3)),
        bytes(MAX_BODY),
    ],
)
def test_a_message_that_brokers_do_not_send_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        take_to_source(data)


def test_a_response_is_read_back_as_written() -> None:
    assert take_to_source(pack_response(1, 2, Answer(b"x"))) == Response(1, 2, Answer(b"x"))


@given(st.binary(max_size=120))
def test_any_bytes_are_taken_or_a_peer_error(data: bytes) -> None:
    for take in (take_from_source, take_to_source, take_status):
        with contextlib.suppress(PeerError):
            take(data)
