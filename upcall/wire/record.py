"""Formats and parses the records of settled requests, as log lines and as fields of systemd's journal. Pure.

    upcall-broker[4711]: request at=2026-01-31T12:00:00.000000Z uid=1000 service=key outcome=answered \
seconds=0.000062 seq=305419896 handler=''

The same names, in capitals and behind UPCALL_, are the journal's fields.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.wire.logfmt import shown

EVENT: Final = "request"
MESSAGE_ID: Final = "6f1c7d7a0d5f4c2e9a3b8e5d41c0b796"  # of all records in the journal; never changes
MAX_LINE: Final = 4096  # bytes; a record is far shorter

_PREFIX = re.compile(r"(?:^|\s)(upcall-[a-z]+)\[(\d+)\]: (\S+)(?: |$)", re.ASCII)
_FIELD = re.compile(r"""([a-z]+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s"']*)(?: |$)""", re.ASCII)
_INFO = 6  # syslog(3)
_LATEST = 253370764800.0  # 9999-01-01: any time zone's local time can still be shown


class Record(NamedTuple):
    """A settled request. `uid`: whose daemon was asked. `outcome`: "answered", or the reason of the refusal. `seq`:
    the broker's sequence number, the same in broker and daemon; 0 if no daemon was asked. `handler`: what answered in
    the daemon, such as a key module's alias; empty in the broker."""

    at: float  # seconds since 1970, when it was settled
    uid: int
    service: str
    outcome: str
    seconds: float  # from receipt in this process until it was settled
    seq: int
    handler: str = ""


class RecordSource(NamedTuple):
    """The process that wrote a record. `name`: upcall-broker or upcall-daemon."""

    name: str
    pid: int


def line_of(record: Record) -> str:
    """Returns the event and its fields, in the format of EventLog, without name and pid."""
    fields = {**record._asdict(), "at": _time(record.at), "seconds": f"{record.seconds:.6f}"}
    return " ".join([EVENT, *(f"{key}={shown(value)}" for key, value in fields.items())])


def fields_of(record: Record, name: str) -> dict[str, object]:
    """Returns the fields for the journal, which adds time and pid itself. `name`: SYSLOG_IDENTIFIER."""
    message = f"{record.service} {record.outcome} for uid {record.uid} after {record.seconds * 1e3:.3f} ms"
    values = {**record._asdict(), "seconds": f"{record.seconds:.6f}"}
    del values["at"]
    return {
        "MESSAGE": message,
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": _INFO,
        "SYSLOG_IDENTIFIER": name,
        **{f"UPCALL_{key.upper()}": value for key, value in values.items()},
    }


def take_line(text: str) -> tuple[RecordSource, Record] | None:
    """Parses a record from a log line, whatever precedes it. None if it is another event. PeerError if it is
    damaged."""
    start = _PREFIX.search(text[:MAX_LINE])
    if start is None or start[3] != EVENT:
        return None
    fields, at = {}, start.end()
    while at < len(text):
        found = _FIELD.match(text, at)
        if found is None:
            raise PeerError("record", f"no field {text[at : at + 20]!r}", at)
        fields[found[1]] = _unquoted(found[2])
        at = found.end()
    return RecordSource(start[1], int(start[2])), _record(fields)


def take_journal(entry: Mapping[str, object], own: int, machine: int) -> tuple[RecordSource, Record] | None:
    """Parses a record from an entry of `journalctl --output=json`. None if it is another entry. PeerError if it is
    damaged or forged.

    Any user may write entries with any fields, except those that journald adds: `_UID` tells who wrote one. A broker
    is root's, or that of `own`, the caller's uid; a daemon writes records of its own user, unless it is root's or of
    `machine`, the uid of the machine's daemon."""
    if entry.get("MESSAGE_ID") != MESSAGE_ID:
        return None
    fields = {key.removeprefix("UPCALL_").lower(): str(value) for key, value in entry.items() if key[:7] == "UPCALL_"}
    try:
        at = _time(int(str(entry["__REALTIME_TIMESTAMP"])) / 1e6)
        pid = int(str(entry.get("_PID", 0)))
        writer = int(str(entry["_UID"]))
    except (KeyError, ValueError, OverflowError, OSError):  # the last two: the time is out of range
        raise PeerError("record", "the journal gives no time, pid or uid") from None
    name, record = str(entry.get("SYSLOG_IDENTIFIER", "")), _record({**fields, "at": at})
    writers = {"upcall-broker": {0, own}, "upcall-daemon": {0, machine, record.uid}}
    if writer not in writers.get(name, ()):
        raise PeerError("record", f"uid {writer} is not that of {name!r}")
    return RecordSource(name, pid), record


def _record(fields: Mapping[str, str]) -> Record:
    """Makes a record. Unknown fields are ignored: a newer version wrote them. PeerError if one is missing or
    out of range."""
    try:
        record = Record(
            datetime.fromisoformat(fields["at"]).timestamp(),
            int(fields["uid"]),
            fields["service"],
            fields["outcome"],
            float(fields["seconds"]),
            int(fields["seq"]),
            fields["handler"],
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise PeerError("record", f"{type(error).__name__}: {error}") from None
    if not 0 <= record.at < _LATEST:
        raise PeerError("record", "the time is out of range")
    return record


def _unquoted(text: str) -> str:
    if text[:1] not in ("'", '"'):
        return text
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        raise PeerError("record", f"{text!r} is no text") from None


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
