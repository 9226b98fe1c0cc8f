"""The body of a quota notice, and the sentences made of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.protocols.quota import notice as quotanotice
from upcall.protocols.quota.notice import (
    EVENTS,
    KINDS,
    Cause,
    Filesystem,
    QuotaNotice,
    Raw,
    Subject,
    amount,
    duration,
    moment,
    pack,
    printable,
    sentence,
    take,
)

NOW = 1_800_000_000
ALICE = QuotaNotice(
    event="over-soft",
    resource="space",
    subject=Subject("user", 5001, "alice"),
    cause=Cause(5001, "alice"),
    filesystem=Filesystem("/home", "/dev/vda3", "ext4"),
    used=9_895_604_650,
    soft=9 << 30,
    hard=10 << 30,
    grace_until=NOW + 6 * 86400,
    percent=102,
    at=NOW,
    count=3,
    lost=1,
)

texts = st.text(st.characters(), max_size=40)
numbers = st.integers(0, (1 << 64) - 1)
ids = st.integers(0, (1 << 32) - 1)
notices = st.builds(
    QuotaNotice,
    event=st.one_of(st.sampled_from(EVENTS), texts),
    resource=st.sampled_from(["space", "files"]),
    subject=st.builds(Subject, st.sampled_from(KINDS), ids, texts),
    cause=st.builds(Cause, st.none() | ids, st.none() | texts),
    filesystem=st.builds(Filesystem, st.none() | texts, texts, texts),
    used=numbers,
    soft=numbers,
    hard=numbers,
    grace_until=st.none() | numbers,
    percent=st.none() | numbers,
    at=numbers,
    count=numbers,
    lost=numbers,
    raw=st.none() | st.builds(Raw, ids, ids, ids, ids),
)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@given(notices)
def test_any_notice_is_read_back_as_written(notice: QuotaNotice) -> None:
    body = pack(notice)
    assert take(body) == notice
    assert len(body) <= 65536


def test_the_body_is_json_with_every_field() -> None:
    assert json.loads(pack(ALICE)) == {
        "version": 1,
        "event": "over-soft",
        "resource": "space",
        "subject": {"kind": "user", "id": 5001, "name": "alice"},
        "cause": {"uid": 5001, "name": "alice"},
        "filesystem": {"mount": "/home", "device": "/dev/vda3", "type": "ext4"},
        "used": 9895604650,
        "soft": 9663676416,
        "hard": 10737418240,
        "grace_until": NOW + 518400,
        "percent": 102,
        "at": NOW,
        "count": 3,
        "lost": 1,
        "raw": None,
    }


def test_the_longest_texts_fit_a_body() -> None:
    most = "\x01" * 4096
    notice = ALICE._replace(filesystem=Filesystem(most, "/dev/x", "ext4"), subject=Subject("user", 1, "\x01" * 256))
    assert len(pack(notice)) < 65536


def changed(path: str, value: object) -> bytes:
    told: dict[str, Any] = json.loads(pack(ALICE))
    *above, last = path.split(".")
    inner = told
    for name in above:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(told).encode()


BAD: list[tuple[str, object]] = [
    ("version", 2),
    ("version", True),
    ("event", 5),
    ("event", "x" * 65),
    ("resource", "realtime"),
    ("subject", None),
    ("subject.kind", "robot"),
    ("subject.kind", ["user"]),
    ("subject.id", -1),
    ("subject.id", 1 << 32),
    ("subject.name", None),
    ("subject.name", "x" * 4097),
    ("cause.uid", "0"),
    ("cause.uid", KeyError),
    ("filesystem", ["/home"]),
    ("filesystem.mount", 1),
    ("filesystem.device", None),
    ("used", 1.5),
    ("used", -1),
    ("soft", None),
    ("hard", 1 << 64),
    ("grace_until", "tomorrow"),
    ("percent", KeyError),
    ("at", False),
    ("count", None),
    ("lost", KeyError),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{path}-{number}" for number, (path, _) in enumerate(BAD)])
def test_a_bad_field_is_refused_by_its_name(path: str, value: object) -> None:
    with pytest.raises(PeerError, match=f"quota notice: {path.split('.')[-1]}"):
        take(changed(path, value))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"version":NaN}', b"[" * 60000, b'{"version":1' + b"0" * 5000 + b"}"],
)
def test_a_body_that_is_no_notice_is_a_peer_error(body: bytes) -> None:
    with pytest.raises(PeerError):
        take(body)


def test_a_body_cut_short_anywhere_is_refused() -> None:
    body = pack(ALICE)
    for size in range(len(body)):
        with pytest.raises(PeerError):
            take(body[:size])


def test_an_unknown_event_is_kept_and_an_unknown_field_ignored() -> None:
    assert take(changed("event", "over-the-moon")).event == "over-the-moon"
    assert take(changed("reason", "a newer broker")) == ALICE


def test_a_negative_number_is_not_packed() -> None:
    with pytest.raises(PeerError):
        pack(ALICE._replace(used=-1))


# --- for people ----------------------------------------------------------------------------------------------

SENTENCES = {
    "over-hard": "Your files on /home take up 9.2 GiB, the limit is 10 GiB: nothing more can be written. "
    "Delete or move files to go on.",
    "over-soft-long": "Your files on /home take up 9.2 GiB, and the time to get below the limit is over: "
    "nothing more can be written until they are below 9 GiB. Delete or move files.",
    "over-soft": "Your files on /home take up 9.2 GiB, over the limit of 9 GiB. Delete or move files; "
    "after Thu 21 Jan 2027, 08:00 (in 6 days) nothing more can be written.",
    "grace": "Your files on /home take up 9.2 GiB, over the limit of 9 GiB. Delete or move files; "
    "after Thu 21 Jan 2027, 08:00 (in 6 days) nothing more can be written.",
    "near": "Your files on /home take up 9.2 GiB of 9 GiB that are allowed (102 %). "
    "Delete or move files before the limit is reached.",
    "below": "Your files on /home take up 9.2 GiB, which is below the limit again. Nothing has to be done.",
    "digest": "There were 3 quota warnings in a short time. Your files on /home take up 9.2 GiB of 9 GiB that are "
    "allowed: look with `upcall quota status`.",
    "test": "This is a test of the quota warnings for /home. Nothing has to be done.",
    "over-the-moon": "Quota event 'over-the-moon'. Your files on /home take up 9.2 GiB of 9 GiB that are allowed: "
    "look with `upcall quota status`.",
}


@pytest.mark.parametrize("event", SENTENCES)
def test_each_event_has_its_sentence(event: str) -> None:
    assert sentence(ALICE._replace(event=event), NOW, reader=5001) == SENTENCES[event]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ("over-hard", "have met their limit: nothing more can be written. Delete or move files to go on."),
        ("below", "are below the limit again. Nothing has to be done."),
    ],
)
def test_a_sentence_without_figures_names_no_numbers(event: str, told: str) -> None:
    notice = ALICE._replace(event=event, filesystem=Filesystem(None, "7:0", ""), used=0, soft=0, hard=0, percent=None)
    assert sentence(notice, NOW, reader=5001) == f"Your files on 7:0 {told}"


def test_a_sentence_for_another_reader_names_the_owner() -> None:
    notice = ALICE._replace(event="over-hard", resource="files", used=1000, hard=1000)
    assert sentence(notice, NOW, reader=0) == (
        "The files of user alice on /home number 1,000, the limit is 1,000 files: no more files can be made. "
        "Delete files to go on."
    )
    assert sentence(notice._replace(subject=Subject("group", 5001, "staff")), NOW, reader=5001).startswith(
        "The files of group staff on /home"
    )


def test_a_sentence_says_when_the_time_of_grace_is_over() -> None:
    assert "(now) nothing more" in sentence(ALICE, NOW + 7 * 86400)
    assert "when the time of grace is over, nothing more" in sentence(ALICE._replace(grace_until=None), NOW)


def test_unprintable_characters_in_names_are_escaped() -> None:
    evil = "\x1b]0;owned\x07\n\u202e\ud800é"
    notice = ALICE._replace(
        subject=Subject("group", 1, evil), filesystem=Filesystem(evil, evil, evil), event="x\x1b[2J"
    )
    shown = sentence(notice, NOW)
    assert shown.isprintable()
    assert "\\x1b]0;owned\\x07\\n\\u202e\\ud800é" in shown


@given(notices, st.none() | ids)
def test_any_notice_has_a_printable_sentence(notice: QuotaNotice, reader: int | None) -> None:
    assert sentence(notice, NOW, reader).isprintable()


def test_amounts_are_shown_in_binary_units_or_files() -> None:
    shown = [amount(n, "space") for n in (0, 1, 1023, 1024, 1536, 1048575, 10 << 30, (1 << 64) - 1)]
    assert shown == ["0 bytes", "1 byte", "1023 bytes", "1 KiB", "1.5 KiB", "1 MiB", "10 GiB", "16 EiB"]
    assert [amount(n, "files") for n in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]


def test_durations_and_moments_are_shown_in_words() -> None:
    shown = [duration(s) for s in (5, 60, 3599, 3600, 86400, 604800)]
    assert shown == ["less than a minute", "1 minute", "60 minutes", "1 hour", "1 day", "7 days"]
    assert moment(NOW) == "Fri 15 Jan 2027, 08:00"
    assert moment(1 << 63) == "a time that no calendar has"


def test_printable_leaves_printable_characters_alone() -> None:
    assert printable("/home/Grüße 日本") == "/home/Grüße 日本"
    assert quotanotice.SERVICE == "quota"


@pytest.mark.parametrize("raw", [[0, 6, 254], [0, 6, 254, -1], [0, 6, 254, 1 << 32], [0, 6, 254, True], "0", {}])
def test_the_kernels_numbers_are_four_or_refused(raw: object) -> None:
    told = {**json.loads(pack(ALICE)), "raw": raw}
    with pytest.raises(PeerError, match="raw is not four"):
        take(json.dumps(told).encode())
    assert take(json.dumps({**told, "raw": [0, 6, 254, 1]}).encode()).raw == Raw(0, 6, 254, 1)
    del told["raw"]
    assert take(json.dumps(told).encode()).raw is None
