"""`upcall quota test`: the outcome of each sink as text, JSON and exit codes."""

from __future__ import annotations

import json
import os
import pty
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from upcall import config
from upcall.cli import COMMANDS, main, quotatest
from upcall.cli.quotatest import command, tell_all, trial
from upcall.core.errors import ModuleFailed
from upcall.protocols.quota.notice import QuotaNotice

log = pytest.importorskip("upcall_quota.log", reason="the plugin upcall-quota is not installed")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's configuration. There is no bus, and a journal without a reader."""
    monkeypatch.setattr(config, "SYSTEM", tmp_path / "system.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):
        monkeypatch.setenv(name, f"unix:path={tmp_path}/none")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(log, "JOURNAL", tmp_path / "journal")
    (tmp_path / "system.toml").touch(0o644)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        yield tmp_path / "system.toml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments], standalone_mode=False, catch_exceptions=False)


def outcomes(result: Result) -> dict[str, Any]:
    return {one["sink"]: one for one in json.loads(result.stdout)}


def test_each_configured_sink_is_tried_and_its_outcome_told(write: Path) -> None:
    write.write_text("[quota]\nsinks = ['log', 'webhook']\nsystem-sinks = ['log', 'webhook']\n")
    found = outcomes(run("--json"))
    assert list(found) == ["log", "webhook"]
    assert (found["log"]["outcome"], found["log"]["why"]) == ("told", "")
    assert (found["webhook"]["outcome"], found["webhook"]["why"]) == ("failed", "quota.webhook.url: is needed")


def test_only_the_chosen_sinks_are_tried(write: Path) -> None:
    found = outcomes(run("--json", "--sink", "dbus", "--sink", "log"))
    assert list(found) == ["dbus", "log"]
    assert found["dbus"]["why"].startswith("no message bus: ")
    assert found["log"]["outcome"] == "told"


def test_outcomes_are_printed_as_text(write: Path) -> None:
    shown = run("--sink", "dbus").stdout
    assert "dbus" in shown
    assert "no message bus" in shown


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (["--sink", "log"], "", os.EX_OK),
        (["--sink", "dbus"], "", os.EX_UNAVAILABLE),
        (["--sink", "siren"], "", os.EX_USAGE),
        ([], "[quota]\nsinks = 1\n", os.EX_CONFIG),
    ],
)
def test_the_exit_code_tells_success_failure_and_wrong_use(
    write: Path, arguments: list[str], text: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write.write_text(text)
    monkeypatch.setitem(COMMANDS, "quotatest", ("quotatest", "A test."))
    done = CliRunner().invoke(main, ["quotatest", *arguments])
    assert done.exit_code == code, done.output


def test_the_terminal_sink_writes_to_the_users_terminal(write: Path) -> None:
    master, slave = pty.openpty()
    path = Path(os.ttyname(slave))
    try:
        os.chown(path, os.geteuid(), 5)
        path.chmod(0o620)
    except PermissionError:
        pytest.skip("/dev/pts is mounted without gid=5, and we are not root")
    assert outcomes(run("--json", "--sink", "terminal"))["terminal"]["outcome"] == "told"
    assert b"This is a test of the quota warnings" in os.read(master, 4096)
    for fd in (master, slave):
        os.close(fd)


def test_a_sink_that_hangs_or_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotatest, "PATIENCE", 0.3)
    closed = threading.Event()

    class Good:
        def tell(self, notice: QuotaNotice, text: str, /) -> None:
            assert notice.event == "test"

        def close(self) -> None:
            closed.set()

    class Hanging(Good):
        def tell(self, notice: QuotaNotice, text: str, /) -> None:
            threading.Event().wait()

    class Broken(Good):
        def tell(self, notice: QuotaNotice, text: str, /) -> None:
            raise ValueError("secret")

    def failing() -> Good:
        raise ModuleFailed("is not there")

    openers = {"hanging": Hanging, "broken": Broken, "failing": failing, "good": Good}
    found = tell_all(dict(openers), trial(os.geteuid(), 0))
    assert [one.outcome for one in found] == ["not in time", "failed", "failed", "told"]
    assert [one.why for one in found] == ["nothing within 0 s", "it is broken: ValueError", "is not there", ""]
    assert [one.trace.splitlines()[-1:] for one in found] == [[], ["ValueError: secret"], [], []]
    assert closed.is_set()
