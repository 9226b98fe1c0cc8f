"""Records as lines and as entries of the journal, both ways, cut short and damaged."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upcall.core.errors import PeerError
from upcall.wire.record import MESSAGE_ID, Record, RecordSource, fields_of, line_of, take_journal, take_line

RECORD = Record(1769860800.25, 1000, "key", "answered", 0.000062, 305419896, "openssl")
LINE = (
    "upcall-daemon[4711]: request at=2026-01-31T12:00:00.250000Z uid=1000 service=key outcome=answered "
    "seconds=0.000062 seq=305419896 handler=openssl"
)
WHO = RecordSource("upcall-daemon", 4711)


def test_a_record_is_read_back_behind_a_prefix_and_with_newer_fields() -> None:
    assert f"upcall-daemon[4711]: {line_of(RECORD)}" == LINE
    assert take_line(LINE) == (WHO, RECORD)
    assert take_line(f"Jan 31 12:00:00 host {LINE}") == (WHO, RECORD)  # as journalctl shows it
    assert take_line(f"{LINE} colour=blue") == (WHO, RECORD)  # of a newer version


def test_the_docs_show_every_field() -> None:
    docs = (Path(__file__).parents[1] / "docs" / "observing.md").read_text()
    assert [f"| `{name}` |" in docs for name in Record._fields] == [True] * len(Record._fields)
    assert MESSAGE_ID in docs and re.fullmatch("[0-9a-f]{32}", MESSAGE_ID)


@pytest.mark.parametrize(
    "line", ["", "upcall-broker[1]: ready folder=/run/upcall", "something else", "request at=5", "upcall-broker[1]: "]
)
def test_other_lines_are_not_records(line: str) -> None:
    assert take_line(line) is None


def test_a_line_cut_short_anywhere_is_a_peer_error() -> None:
    start = LINE.index("request") + len("request")
    whole = {LINE.index("handler=") + len("handler=") + size for size in range(len("openssl") + 1)}
    for size in range(start, len(LINE)):
        if size not in whole:  # a handler's name that is cut short is a name
            with pytest.raises(PeerError):
                take_line(LINE[:size])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uid=1000", "uid=x"),
        ("uid=1000", "uid"),
        ("uid=1000 ", ""),
        ("seconds=0.000062", "seconds=soon"),
        ("at=2026", "at=20266"),
        ("2026-01-31T12:00:00.250000Z", "0001-01-01T00:00:00+14:00"),
        ("2026-01-31T12:00:00.250000Z", "9999-12-31T23:59:59-14:00"),
        ("2026-01-31T12:00:00.250000Z", "1969-12-31T23:59:59Z"),
        ("key", "'ke"),
        ("key", "'k\\x'"),
        ("=openssl", '=o"p'),
    ],
)
def test_a_line_with_a_damaged_field_is_a_peer_error(old: str, new: str) -> None:
    with pytest.raises(PeerError):
        take_line(LINE.replace(old, new))


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
@example("it's", "'", '"')
def test_any_text_in_a_record_is_read_back(service: str, outcome: str, handler: str) -> None:
    record = RECORD._replace(service=service, outcome=outcome, handler=handler)
    line = line_of(record)
    assert line.isprintable()
    assert take_line(f"upcall-broker[1]: {line}") == (RecordSource("upcall-broker", 1), record)


@given(st.text())
def test_any_text_behind_request_is_a_record_or_a_peer_error(text: str) -> None:
    with contextlib.suppress(PeerError):
        take_line(f"upcall-broker[1]: request {text}")


def entry(**changes: object) -> dict[str, object]:
    fields = {name: str(value) for name, value in fields_of(RECORD, "upcall-daemon").items()}
    return {"__REALTIME_TIMESTAMP": "1769860800250000", "_PID": "4711", "_UID": "1000", **fields, **changes}


def test_a_journal_entry_is_read_back_and_other_entries_are_skipped() -> None:
    assert take_journal(json.loads(json.dumps(entry())), 0, 0) == (WHO, RECORD)
    assert entry()["MESSAGE"] == "key answered for uid 1000 after 0.062 ms"
    assert take_journal(entry(MESSAGE_ID="other"), 0, 0) is None


@pytest.mark.parametrize(
    "changes",
    [{"UPCALL_UID": "x"}, {"__REALTIME_TIMESTAMP": "x"}, {"_PID": "?"}, {"_UID": "?"}, {"UPCALL_SECONDS": [1, 2]}],
)
def test_a_damaged_journal_entry_is_a_peer_error(changes: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        take_journal(entry(**changes), 0, 0)


OWN, MACHINE, ANOTHER = "1001", "990", "1002"  # the record's uid is 1000


@pytest.mark.parametrize(("name", "uids"), [("upcall-broker", ["0", OWN]), ("upcall-daemon", ["0", MACHINE, "1000"])])
def test_a_journal_entry_counts_only_if_its_process_may_have_written_it(name: str, uids: list[str]) -> None:
    """Any user may write entries in any process's name: only `_UID` is journald's."""
    for uid in ("0", "1000", OWN, MACHINE, ANOTHER):
        one = entry(SYSLOG_IDENTIFIER=name, _UID=uid)
        if uid in uids:
            assert take_journal(one, int(OWN), int(MACHINE)) == (RecordSource(name, 4711), RECORD)
        else:
            with pytest.raises(PeerError, match=f"uid {uid} is not that of"):
                take_journal(one, int(OWN), int(MACHINE))


def test_a_journal_entry_of_another_program_or_without_a_uid_is_a_peer_error() -> None:
    without = entry()
    del without["_UID"]
    for one in (without, entry(SYSLOG_IDENTIFIER="sshd", _UID="0")):
        with pytest.raises(PeerError):
            take_journal(one, int(OWN), int(MACHINE))
