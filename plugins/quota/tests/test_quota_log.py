"""The journal's datagrams, into a socket that is not the journal's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_quota.log import MESSAGE_ID, Log

from upcall.core.errors import ModuleFailed
from upcall.process.log import EventLog
from upcall.sink import TryLater
from upcall.testing.notices import HOSTILE, hostile, notice
from upcall.testing.processes import until


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(60)
        yield listening


def fields(data: bytes) -> dict[str, bytes]:
    """As journald takes them."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        key, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert key.decode("ascii") not in found
        found[key.decode("ascii")] = value
        data = rest
    return found


def test_each_value_of_a_notice_is_a_field_of_the_journal(journal: socket.socket, tmp_path: Path) -> None:
    Log(tmp_path / "socket").tell(notice(), "a sentence")
    found = fields(journal.recv(65536))
    assert found["MESSAGE"] == b"a sentence"
    assert (found["MESSAGE_ID"], len(MESSAGE_ID)) == (MESSAGE_ID.encode(), 32)
    assert (found["PRIORITY"], found["SYSLOG_IDENTIFIER"]) == (b"4", b"upcall-quota")
    assert (found["QUOTA_EVENT"], found["QUOTA_SUBJECT_NAME"]) == (b"over-hard", b"alice")
    assert (found["QUOTA_MOUNT"], found["QUOTA_HARD"]) == (b"/home", b"10737418240")
    assert "QUOTA_GRACE_UNTIL" not in found


def test_no_hostile_name_adds_a_field_of_the_journal(journal: socket.socket, tmp_path: Path) -> None:
    Log(tmp_path / "socket").tell(hostile()._replace(event="x\n_UID=0\nPRIORITY=0"), "two\nlines")
    found = fields(journal.recv(65536))
    assert found["MESSAGE"] == b"two\nlines"
    assert found["PRIORITY"] == b"5"
    assert "_UID" not in found
    assert found["QUOTA_SUBJECT_NAME"] == HOSTILE.encode("utf-8", "backslashreplace")


def test_a_journal_that_reads_nothing_is_not_waited_for(journal: socket.socket, tmp_path: Path) -> None:
    sink = Log(tmp_path / "socket")
    with pytest.raises(TryLater, match="the journal takes nothing"):
        for _ in range(10_000):
            sink.tell(notice(), "text")


def test_a_journal_socket_of_another_kind_is_a_failure(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "socket"))
        with pytest.raises(ModuleFailed, match="the journal takes nothing"):
            Log(tmp_path / "socket").tell(notice(), "text")


@pytest.mark.parametrize("there", [True, False])
def test_without_a_journal_the_notice_goes_to_the_daemons_log(tmp_path: Path, there: bool) -> None:
    if there:  # but nobody listens
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
            left.bind(str(tmp_path / "socket"))
    file = tmp_path / "log"
    log = EventLog("test", os.open(file, os.O_WRONLY | os.O_CREAT))
    sink = Log(tmp_path / "socket", log)
    sink.tell(hostile(), "a sentence")
    until(lambda: "\n" in file.read_text(), "a line")
    written = file.read_text()
    assert written.count("\n") == 1
    assert "quota event=digest resource=space" in written
    assert "text='a sentence'" in written
    assert written.rstrip("\n").isprintable()
    sink.close()
