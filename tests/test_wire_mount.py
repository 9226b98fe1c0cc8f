"""The messages between `upcall mount` and the source that mounts: whole, cut short, with more than there may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs.mounting.messages import (
    KEY_BYTES,
    MAX_REPLY,
    MAX_REQUEST,
    MAX_SIGNATURES,
    MOUNT,
    UNMOUNT,
    Made,
    MountReply,
    MountRequest,
    is_name,
    pack_reply,
    pack_request,
    take_made,
    take_reply,
    take_request,
)

SIGNATURE = "0123456789abcdef"
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}", fullmatch=True).filter(is_name)
signatures = st.binary(min_size=8, max_size=8).map(bytes.hex)
mounts = st.builds(
    MountRequest,
    st.just(MOUNT),
    names,
    st.lists(signatures, min_size=1, max_size=MAX_SIGNATURES).map(tuple),
    st.sampled_from(KEY_BYTES),
    st.one_of(st.just(""), signatures),
    st.just(False),
)
unmounts = st.builds(MountRequest, st.just(UNMOUNT), names, st.just(()), st.just(0), st.just(""), st.booleans())


@given(st.one_of(mounts, unmounts))
def test_a_request_is_read_back_and_one_of_another_length_refused(request: MountRequest) -> None:
    data = pack_request(request)
    assert len(data) <= MAX_REQUEST
    assert take_request(data) == request
    for size in range(len(data)):
        with pytest.raises(PeerError):
            take_request(data[:size])
    with pytest.raises(PeerError):
        take_request(data + b"\0")


@pytest.mark.parametrize(
    "request_",
    [
        MountRequest(MOUNT, "a,b", (SIGNATURE,)),
        MountRequest(MOUNT, "../etc", (SIGNATURE,)),
        MountRequest(MOUNT, "a b", (SIGNATURE,)),
        MountRequest(MOUNT, "a\nb", (SIGNATURE,)),
        MountRequest(MOUNT, ".hidden", (SIGNATURE,)),
        MountRequest(MOUNT, "-o", (SIGNATURE,)),
        MountRequest(MOUNT, "é", (SIGNATURE,)),
        MountRequest(MOUNT, "x" * 65, (SIGNATURE,)),
        MountRequest(MOUNT, "", (SIGNATURE,)),
        MountRequest(MOUNT, "a", ()),
        MountRequest(MOUNT, "a", (SIGNATURE,) * (MAX_SIGNATURES + 1)),
        MountRequest(MOUNT, "a", (SIGNATURE,), 17),
        MountRequest(MOUNT, "a", (SIGNATURE,), lazy=True),
        MountRequest(MOUNT, "a", (SIGNATURE.upper(),)),
        MountRequest(MOUNT, "a", ("0123",)),
        MountRequest(MOUNT, "a", (SIGNATURE,), names_signature="x"),
        MountRequest(UNMOUNT, "a", (SIGNATURE,), 0),
        MountRequest(UNMOUNT, "a", (), 16),
        MountRequest(3, "a", (SIGNATURE,)),
        MountRequest(300, "a", (SIGNATURE,)),
    ],
    ids=repr,
)
def test_a_request_that_would_be_refused_is_not_packed(request_: MountRequest) -> None:
    with pytest.raises(PeerError):
        pack_request(request_)


@given(st.binary(max_size=MAX_REQUEST + 8))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    try:
        request = take_request(data)
    except PeerError:
        return
    assert pack_request(request) == data


@given(st.integers(0, 255), st.text(max_size=MAX_REPLY))
def test_a_reply_fits_and_its_text_is_printable(status: int, text: str) -> None:
    data = pack_reply(MountReply(status, text))
    assert len(data) <= MAX_REPLY
    reply = take_reply(data)
    assert reply.status == status and reply.text.isprintable()


@given(st.binary(max_size=MAX_REPLY + 8))
def test_any_reply_is_refused_or_printable(data: bytes) -> None:
    try:
        reply = take_reply(data)
    except PeerError:
        return
    assert reply.text.isprintable()


def test_the_source_of_a_mount_says_for_whom_it_was_made() -> None:
    made = Made(1000, "private")
    assert str(made) == "upcall:1000:private"
    assert take_made(str(made)) == made


@pytest.mark.parametrize(
    "source",
    [
        "", "/dev/sda1", "upcall:", "upcall:1000", "upcall:x:private", "upcall:1000:", "upcall:1000:../x",
        "upcall:99999999999:a", "upcall:4294967296:a", "upcall:1000:a b", "upcall:-1:a", " upcall:1000:a",
        "upcall:1000:a\n",
    ],
)  # fmt: skip
def test_another_source_says_nothing(source: str) -> None:
    assert take_made(source) is None
