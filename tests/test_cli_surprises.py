"""Commands that look change nothing, and commands that do something say what they could not do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall import config
from upcall.cli import daemon, main
from upcall.kernel import keyring
from upcall.observe.doctor import configuration
from upcall.observe.doctor.findings import Finding, note, ok
from upcall.observe.doctor.system import Scene
from upcall.observe.doctor.table import Check, bounded
from upcall.process import start_python as startpython
from upcall.process.paths import daemon_socket, find_place, user_folder
from upcall.testing.processes import RunningBroker, StartDaemon


def test_looking_for_broker_and_daemon_creates_no_folder(runtime_folder: Path) -> None:
    find_place()
    daemon_socket(create=False)
    for words in (["status"], ["doctor"], ["lock"]):
        CliRunner().invoke(main, words)
    assert not list(runtime_folder.iterdir())
    user_folder()
    assert [one.name for one in runtime_folder.iterdir()] == ["upcall"]


def test_a_daemon_says_which_other_one_it_replaces(
    broker: RunningBroker, start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon._tell_of_another(broker.folder)
    assert capsys.readouterr().err == ""
    running = start_daemon(broker)
    daemon._tell_of_another(broker.folder)
    expected = f"upcall: note: this daemon replaces the daemon with pid {running.pid}, which ends\n"
    assert capsys.readouterr().err == expected


def test_a_log_without_records_says_how_to_turn_them_on(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    done = CliRunner().invoke(main, ["log", str(tmp_path / "log")])
    assert done.exit_code == os.EX_OK and "there are no records in" in done.stderr


def test_doctor_tells_of_an_invalid_configuration_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "upcall").mkdir()
    (tmp_path / "upcall/config.toml").write_text("broken = [")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def other(_: Scene) -> Iterator[Finding]:
        config.load()
        yield ok("read")

    checks = [Check("configuration", "", configuration.ours), Check("other", "", other)]
    found = [finding.state for check in checks for finding in bounded(check, Scene())]
    assert found == ["problem", "note"]


def test_doctor_says_the_same_once() -> None:
    check = Check("x", "", lambda _: iter([note("no CONFIG_CIFS_UPCALL"), ok("y"), note("no CONFIG_CIFS_UPCALL")]))
    assert bounded(check, Scene()) == [note("no CONFIG_CIFS_UPCALL"), ok("y")]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_demo_that_is_ended_leaves_neither_folder_nor_token_nor_traceback(
    folder: Path, number: signal.Signals, code: int
) -> None:
    work = folder.parent / "work"  # a short name, for sockets
    work.mkdir()
    command = startpython.command("upcall", "demo", "--bits", "2048", "--keys", "1000000")
    environment = {**os.environ, "TMPDIR": str(work)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        while b"RSA-2048 key made" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        signature = line.decode().partition("its auth token ")[2].split()[0]
        assert keyring.find(signature) is not None
        process.send_signal(number)
        assert process.wait(120) == code
        assert process.stderr.read() == b""
    assert not list(work.iterdir())
    assert keyring.find(signature) is None
