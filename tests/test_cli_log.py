"""Records of requests: from a real broker and daemon to a file, stderr or a played journal, and `upcall log`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from upcall import config
from upcall.broker.settings import BrokerSettings
from upcall.cli import main
from upcall.client import Client
from upcall.config import ConfigError
from upcall.core.errors import Refused, UsageError
from upcall.daemon.settings import DaemonSettings
from upcall.observe import recorder
from upcall.observe.recorder import Recorder, RecordFile, check_where, wanted
from upcall.observe.tail import lines
from upcall.process.settings import dumps
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningDaemon, Started, until
from upcall.wire.record import MESSAGE_ID, Record, line_of, take_line

RECORD = Record(1769860800.25, 1000, "key", "answered", 0.000062, 7, "toy")
REFUSED = RECORD._replace(uid=1001, service="cifs.spnego", outcome="no-ticket", handler="")


def written(path: Path, *records: Record) -> Path:
    path.write_text("".join(f"upcall-broker[1]: {line_of(one)}\n" for one in records))
    return path


def log(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["log", *arguments])


def shown(*arguments: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in log("--json", *arguments).stdout.splitlines()]


# --- reading ---------------------------------------------------------------------------------------------------


def test_log_prints_records_as_a_table(tmp_path: Path) -> None:
    result = log(str(written(tmp_path / "log", RECORD, REFUSED)))
    assert result.exit_code == 0
    head, first, second = result.stdout.splitlines()
    assert head.split() == ["time", "who", "uid", "service", "outcome", "ms", "seq", "handler"]
    assert first.split()[2:] == ["broker", "1000", "key", "answered", "0.062", "7", "toy"]
    assert second.split()[2:] == ["broker", "1001", "cifs.spnego", "no-ticket", "0.062", "7"]


@pytest.mark.parametrize("choice", [("--uid", "1001"), ("--service", "cifs.spnego"), ("--outcome", "no-ticket")])
def test_log_filters_by_uid_service_or_outcome(tmp_path: Path, choice: tuple[str, str]) -> None:
    (found,) = shown(*choice, str(written(tmp_path / "log", RECORD, REFUSED)))
    assert found == {"who": "upcall-broker", "pid": 1, **REFUSED._asdict()}


def test_damaged_records_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "log", RECORD, REFUSED)
    good = path.read_bytes()
    bad = b"upcall-broker[1]: request at=x\nupcall-broker[1]: request \xff\xfe\0\n" + b"x" * 100_000
    path.write_bytes(b"upcall-broker[1]: ready\n" + bad + b"\n" + good[:-20])
    result = log("--json", str(path))
    assert [json.loads(line)["uid"] for line in result.stdout.splitlines()] == [1000]
    assert result.stderr == "3 damaged records passed over\n"


def test_log_escapes_control_characters_in_a_record(tmp_path: Path) -> None:
    assert "\x1b" not in log(str(written(tmp_path / "log", RECORD._replace(handler="\x1b[2J")))).stdout


def test_log_reads_records_from_standard_input(tmp_path: Path) -> None:
    text = written(tmp_path / "log", RECORD).read_text()
    assert CliRunner().invoke(main, ["log", "--json", "-"], input=text).stdout.count("\n") == 1


def test_log_of_a_missing_file_is_an_error() -> None:
    result = log("/nowhere/at/all")
    assert result.exit_code == os.EX_NOINPUT
    assert "/nowhere/at/all" in result.stderr


def test_a_file_is_followed_across_rotation_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntw")
    found = lines(path, follow=True, pause=0.001)

    def following() -> str:
        return next(line for line in found if line is not None)

    assert next(found) == "one"
    assert next(found) is None
    with path.open("a") as file:
        file.write("o\n")
    assert following() == "two"
    path.rename(tmp_path / "log.1")
    with (tmp_path / "log.1").open("a") as file:
        file.write("three\n")
    assert following() == "three"
    path.write_text("four\n")
    assert following() == "four"
    path.write_text("")
    assert next(found) is None
    path.write_text("5\n")
    assert following() == "5"


def test_log_reads_records_from_the_journal_and_reports_its_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """journalctl is a script that notes its arguments and prints prepared entries."""
    entry = {"MESSAGE_ID": MESSAGE_ID, "__REALTIME_TIMESTAMP": "1769860800250000", "_PID": "5", "UPCALL_UID": "1000"}
    entry |= {"SYSLOG_IDENTIFIER": "upcall-broker", "UPCALL_SERVICE": "key", "UPCALL_OUTCOME": "answered"}
    entry |= {"UPCALL_SECONDS": "0.000062", "UPCALL_SEQ": "7", "UPCALL_HANDLER": "toy", "_UID": "0"}
    forged = {**entry, "_UID": str(os.geteuid() + 1)}
    program = tmp_path / "journalctl"
    program.write_text(
        f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked\ncat <<'E'\n"
        f"{json.dumps(entry)}\n{json.dumps(forged)}\nnonsense\n[]\nE\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = log("--json")
    assert json.loads(result.stdout) == {"who": "upcall-broker", "pid": 5, **RECORD._asdict()}
    assert result.stderr == "3 damaged records passed over\n"
    assert (tmp_path / "asked").read_text().split()[-1] == f"MESSAGE_ID={MESSAGE_ID}"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "journalctl ended with 1" in log().stderr
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    result = log()
    assert "there is no journalctl here" in result.stderr
    assert result.exit_code == os.EX_UNAVAILABLE


# --- writing ---------------------------------------------------------------------------------------------------


def records(path: Path) -> list[Record]:
    found = [take_line(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [one[1] for one in found if one is not None]


def test_broker_and_daemon_record_the_same_requests(folder: Path, keyring: FolderKeyring, signature: str) -> None:
    ours, theirs = folder.parent / "broker.requests", folder.parent / "daemon.requests"
    arguments = ["-m", "upcall.broker", dumps(BrokerSettings(folder, records=str(ours)))]
    modules = {"toy": "upcall.testing.toy:TOY"}
    with (
        Started(arguments, folder.parent / "broker.log") as broker,
        RunningDaemon(folder, folder.parent / "keys", modules, settings=DaemonSettings(records=str(theirs))),
    ):
        until(lambda: "registered" in broker.log, "a daemon")
        with Client(folder) as client:
            client.wrap(signature, b"0123456789abcdef")
            with pytest.raises(Refused):
                client.wrap("feedfeedfeedfeed", b"0123456789abcdef")
        until(lambda: len(records(ours)) == len(records(theirs)) == 2, "two records on each side")
        broker.signal(signal.SIGTERM)
        assert broker.wait() == 0
    # Workers answer first and write afterwards: which of two writes first is not said.
    answered = sorted(records(theirs), key=lambda one: one.outcome)
    for here, there in zip(records(ours), answered, strict=True):
        assert (here.uid, here.service, here.outcome, here.seq) == (there.uid, there.service, there.outcome, there.seq)
        assert min(here.seconds, there.seconds) > 0
    assert [(one.outcome, one.handler) for one in answered] == [("answered", "toy"), ("no-key", "")]
    assert ours.stat().st_mode & 0o777 == 0o640


def test_no_records_are_written_by_default(folder: Path) -> None:
    with Started(["-m", "upcall.broker", dumps(BrokerSettings(folder))], folder.parent / "broker.log") as broker:
        broker.logged("broker-ready")
        with Client(folder) as client, pytest.raises(Refused):
            client.wrap("feedfeedfeedfeed", b"0123456789abcdef")
        broker.signal(signal.SIGTERM)
        broker.wait()
        assert " request " not in broker.log


def test_an_unwritable_record_file_is_logged_and_the_broker_still_starts(folder: Path) -> None:
    arguments = ["-m", "upcall.broker", dumps(BrokerSettings(folder, records=str(folder.parent)))]
    with Started(arguments, folder.parent / "broker.log") as broker:
        broker.logged("record-failed")
        broker.logged("broker-ready")


def test_records_go_to_stderr_if_so_configured(folder: Path) -> None:
    arguments = ["-m", "upcall.broker", dumps(BrokerSettings(folder, records="stderr"))]
    with Started(arguments, folder.parent / "broker.log") as broker:
        broker.logged("broker-ready")
        with Client(folder) as client, pytest.raises(Refused):
            client.wrap("feedfeedfeedfeed", b"0123456789abcdef")
        broker.logged("outcome=no-daemon")
    (record,) = records(folder.parent / "broker.log")
    assert (record.uid, record.service, record.seq) == (os.getuid(), "key", 0)


def test_a_record_file_is_created_again_after_it_was_renamed_or_deleted(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "log")
    file.write(b"one\n")
    (tmp_path / "log").rename(tmp_path / "log.1")
    file.write(b"two\n")
    (tmp_path / "log").unlink()
    file.write(b"three\n")
    assert (tmp_path / "log.1").read_bytes() == b"one\n"
    assert (tmp_path / "log").read_bytes() == b"three\n"


def test_sighup_after_a_rotation_does_not_end_the_broker(folder: Path) -> None:
    path = folder.parent / "requests"
    arguments = ["-m", "upcall.broker", dumps(BrokerSettings(folder, records=str(path)))]
    with Started(arguments, folder.parent / "broker.log") as broker:
        broker.logged("broker-ready")
        with Client(folder) as client:
            for count in (1, 2):
                path.rename(f"{path}.{count}")
                broker.signal(signal.SIGHUP)
                with pytest.raises(Refused):
                    client.wrap("feedfeedfeedfeed", b"0123456789abcdef")
                until(lambda: len(records(path)) == 1, "a record")


def test_a_record_file_must_be_a_regular_file_of_the_process_own_user(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ".", "no/such/folder"):
        with pytest.raises(OSError):
            RecordFile(tmp_path / name)
    assert not (tmp_path / "aim").exists()
    if os.geteuid() == 0:
        (tmp_path / "theirs").touch()
        os.chown(tmp_path / "theirs", 65534, 0)
        with pytest.raises(PermissionError, match="not a regular file of ours"):
            RecordFile(tmp_path / "theirs")


def test_a_record_is_sent_to_the_journal_as_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        journal.settimeout(60)
        Recorder("upcall-broker", "journal", tmp_path / "socket")(1000, "key", "answered", 0.000062, 7)
        sent = dict(line.split("=", 1) for line in journal.recv(4096).decode().splitlines())
    assert sent["UPCALL_UID"] == "1000" and sent["UPCALL_SERVICE"] == "key" and sent["UPCALL_OUTCOME"] == "answered"
    assert sent["UPCALL_SECONDS"] == "0.000062" and sent["UPCALL_SEQ"] == "7" and sent["UPCALL_HANDLER"] == ""
    assert sent["MESSAGE_ID"] == MESSAGE_ID and sent["SYSLOG_IDENTIFIER"] == "upcall-broker"


def test_records_lost_while_the_journal_is_away_are_counted_without_blocking(tmp_path: Path) -> None:
    """The number of lost records is reported once the journal is back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        record = Recorder("upcall-broker", "journal", tmp_path / "socket")
        record(1000, "key", "answered", 0.0, 1)
        record.flush()
        journal.bind(str(tmp_path / "socket"))
        journal.settimeout(60)
        record(1000, "key", "answered", 0.0, 2)
        assert b"UPCALL_SEQ=2\n" in journal.recv(4096)
        assert b"MESSAGE=1 records of requests were lost\n" in journal.recv(4096)


def test_records_beyond_the_rate_limit_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(recorder, "_PER_SECOND", 3)
    monkeypatch.setattr(time, "time", lambda: now[0])
    record = Recorder("upcall-broker", str(tmp_path / "log"))
    for seq in range(10):
        record(1000, "key", "answered", 0.0, seq)
    now[0] = 101.5
    record(1000, "key", "answered", 0.0, 10)
    record.flush()
    assert [one.seq for one in records(tmp_path / "log")] == [0, 1, 2, 10]
    assert "lost records=7" in (tmp_path / "log").read_text()


def test_after_a_full_disk_records_begin_on_a_new_line(tmp_path: Path) -> None:
    """A record cut short is ended before the next one is written."""
    code = """
import resource, signal, sys
from pathlib import Path
from upcall.observe.recorder import RecordFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = RecordFile(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
file.write(b"1234\\n")
file.write(b"5678\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.write(b"9\\n")
"""
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert path.read_bytes() == b"1234\n5\n9\n"


# --- who says so -----------------------------------------------------------------------------------------------


def test_the_configuration_chooses_where_records_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    monkeypatch.setattr(config, "SYSTEM", file)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert wanted(None, user=False) == "no"
    for text, where in (
        ("requests = true", "stderr"),
        ('requests = true\nto = "journal"', "journal"),
        ('requests = true\nto = "/var/log/upcall"', "/var/log/upcall"),
        ('to = "journal"', "no"),
    ):
        file.write_text(f"[log]\n{text}\n")
        assert wanted(None, user=True) == where
    assert wanted("no", user=False) == "no"
    file.write_text('[log]\nto = "somewhere"\n')
    with pytest.raises(ConfigError, match=r"log\.to"):
        wanted(None, user=False)


def test_a_record_file_must_be_an_absolute_path() -> None:
    with pytest.raises(UsageError, match="somewhere"):
        check_where("somewhere")
    for name in ("broker", "daemon"):
        result = CliRunner().invoke(main, [name, "--log-requests", "relative/path"])
        assert result.exit_code == os.EX_USAGE, result.output


def test_records_written_by_several_threads_are_all_kept(tmp_path: Path) -> None:
    record = Recorder("upcall-daemon", str(tmp_path / "log"))

    def tell() -> None:
        for seq in range(50):
            record(1, "key", "answered", 0.0, seq)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    record.flush()
    assert sorted(one.seq for one in records(tmp_path / "log")) == sorted([*range(50)] * 4)
