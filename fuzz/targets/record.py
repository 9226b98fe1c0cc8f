"""Fuzzes lines of the recorder and entries of the journal, to which any user can write.

Raises only PeerError. A record writes a line that parses to the same values.
"""

from __future__ import annotations

import json

from fuzz.target import same, taken
from upcall.cli.log import _object
from upcall.wire.record import MESSAGE_ID, Record, fields_of, line_of, take_journal, take_line

_RECORD = Record(1_700_000_000.25, 1000, "key", "answered", 0.0031, 77, "openssl")
_ENTRY = {**fields_of(_RECORD, "upcall-broker"), "__REALTIME_TIMESTAMP": "1700000000250000", "_PID": "7", "_UID": "0"}
SEEDS = [
    f"upcall-broker[7]: {line_of(_RECORD)}".encode(),
    f"Nov 3 host upcall-daemon[8]: {line_of(_RECORD._replace(service='a b', handler=''))}".encode(),
    json.dumps(_ENTRY).encode(),
    b'{"MESSAGE_ID":"%b","__REALTIME_TIMESTAMP":"%b"}' % (MESSAGE_ID.encode(), b"9" * 30),
]


def run(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    found = taken(take_line, text)
    if found is not None:
        source, record = found
        again = taken(take_line, f"{source.name}[{source.pid}]: {line_of(record)}")
        if again is not None:
            same(again[1][1:4], record[1:4])
    entry = taken(_object, text)
    if entry is not None:
        taken(lambda one: take_journal(one, 0, 0), entry)
