"""Fuzzes records of sessions: root's files; a truncated or edited one must not prevent logins.

Never raises. Each process in a record is named by a line.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

from fuzz.target import holds
from upcall.install.sessions import records
from upcall.install.sessions.records import Records, SessionProcess

SEEDS = [b"daemon 4711 8812345\nsession 4700 8812300\n", b"daemon x y\nsession 1\n", b"session -1 -1\n"]
_FOLDER = tempfile.TemporaryDirectory(prefix="upcall-fuzz-")
_FILE = Path(_FOLDER.name) / "1000"


def run(data: bytes) -> None:
    _FILE.write_bytes(data)
    named = set[SessionProcess]()

    def lives(pid: int) -> SessionProcess | None:
        return next((one for one in named if one.pid == pid), None)

    take = records._process

    def taken(numbers: str) -> SessionProcess | None:
        found = take(numbers)
        if found is not None:
            named.add(found)
        return found

    with mock.patch.object(records, "process", lives), mock.patch.object(records, "_process", taken):
        found = Records(_FILE.parent).read(1000)
    holds(set(found.sessions) <= named, "a process that no line names")
