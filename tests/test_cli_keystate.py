"""What `upcall status`, `key list` and `key show` say of the user's own keys and daemon."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upcall.cli import main, personal
from upcall.cli.keystate import KeyState, state_of
from upcall.process.control import DaemonControl
from upcall.testing.processes import RunningBroker, StartDaemon

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
TEN = time.mktime((*time.localtime()[:3], 10, 4, 0, 0, 0, -1))  # 10:04 today
DAEMON: dict[str, Any] = {"keys": [], "held": [], "locks": [], "passphrases": []}
ONE = {"cause": "command", "since": TEN, "signature": KEY}
ALL = {"cause": "screen-lock", "since": TEN, "signature": None, "unlocked": []}


@pytest.mark.parametrize(
    ("added", "source", "daemon", "words"),
    [
        (False, "ask", DAEMON, "not added"),
        (False, "ask", None, "not added"),
        (True, "ask", None, "no daemon"),
        (True, "ask", DAEMON, "passphrase missing"),
        (True, "ask", {**DAEMON, "passphrases": [KEY]}, "ready"),
        (True, "keyring", DAEMON, "ready"),
        (True, None, DAEMON, "ready"),
        (True, "ask", {**DAEMON, "keys": [{"signature": KEY, "module": "openssl", "open": True}]}, "open"),
        (True, "ask", {**DAEMON, "locks": [ONE]}, "locked since 10:04 (upcall lock)"),
        (True, "ask", {**DAEMON, "locks": [ALL]}, "locked since 10:04 (screen lock)"),
        (True, "none", {**DAEMON, "locks": [{**ALL, "unlocked": [KEY]}]}, "ready"),
        (True, "none", {**DAEMON, "locks": [{**ONE, "signature": OTHER}]}, "ready"),
        (True, "none", {**DAEMON, "locks": [{**ALL, "since": TEN + 60}, ONE]}, "locked since 10:04 (upcall lock)"),
        (True, "ask", {"keys": [{"signature": KEY, "locked": True}]}, "locked (upcall lock)"),  # an older daemon
        (True, "ask", {"keys": []}, "ready"),
    ],
)
def test_the_state_of_a_key_follows_from_keyring_and_daemon(
    added: bool, source: str | None, daemon: dict[str, Any] | None, words: str
) -> None:
    assert str(state_of(KEY, source, daemon, lambda _: 7 if added else None)) == words


def test_a_lock_of_another_day_is_shown_with_its_day() -> None:
    assert re.fullmatch(r"locked since \d{4}-\d\d-\d\d \d\d:\d\d \(suspend\)", str(KeyState("locked", "suspend", 1e9)))


def row(name: str, state: KeyState) -> dict[str, Any]:
    return {"name": name, "signature": KEY, **state.as_json()}


OWN: dict[str, Any] = {
    "uid": 1000,
    "keys": [
        row("home", KeyState("open")),
        row("work", KeyState("locked", "screen-lock", TEN)),
        row("old", KeyState("not added")),
    ],
    "unreadable": 0,
    "daemon": {"pid": 7, "since": TEN, "version": "1", "last_refusal": {}},
}
BROKER: dict[str, Any] = {"broker": {"pid": 9, "uid": 0}, "daemons": [{"pid": 7}]}


def test_a_personal_status_counts_keys_by_state_and_says_what_helps() -> None:
    assert list(personal.lines(OWN, BROKER)) == [
        "3 keys: 1 open, 1 locked since 10:04 (screen lock), 1 not added",
        "  locked: work; `upcall unlock work` helps",
        "  not added: old; `upcall key add old` helps",
        "daemon: pid 7, since 10:04",
        "broker: pid 9, the system's",
    ]


def test_a_personal_status_names_the_last_refusal_and_a_broker_that_does_not_know_the_daemon() -> None:
    last = {"at": TEN, "service": "key", "reason": "locked", "why": "locked\x1b[2J"}
    own = {**OWN, "keys": [], "unreadable": 2, "daemon": {**OWN["daemon"], "last_refusal": last}}
    broker = {"broker": {"pid": 9, "uid": 1000}, "daemons": []}
    assert list(personal.lines(own, broker)) == [
        "no keys: `upcall key generate` makes one",
        "2 more cannot be read: `upcall key list` says why",
        "daemon: pid 7, since 10:04, not registered with this broker; "
        "last refusal at 10:04 (key): locked: locked\\x1b[2J",
        "broker: pid 9, yours",
    ]


def test_several_keys_of_a_state_are_helped_by_one_command() -> None:
    locked = KeyState("locked", "command", TEN)
    own = {**OWN, "keys": [row("a", locked), row("b", locked)], "daemon": None}
    alone = {**own, "keys": [row("a", KeyState("no daemon"))]}
    assert next(personal.lines(alone, None)) == "1 key: 1 without a daemon"
    lines = list(personal.lines(own, None))
    assert lines[:2] == ["2 keys: 2 locked since 10:04 (upcall lock)", "  locked: a, b; `upcall unlock` helps"]
    assert lines[2].startswith("no daemon: start it: `")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_folder: Path) -> Path:
    for name in ("DATA", "CONFIG"):
        (tmp_path / name).mkdir(0o700)
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def test_status_shows_ones_own_and_with_all_the_brokers_tables(
    own_home: Path, broker: RunningBroker, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(broker, control=True)
    text = run("status", "--all", "--runtime", str(broker.folder))
    assert f"daemon: pid {daemon.pid}, since " in text and "daemons" in text
    told = json.loads(run("status", "--json", "--runtime", str(broker.folder)))
    assert told["you"]["daemon"]["pid"] == daemon.pid
    assert told["daemons"][0]["pid"] == daemon.pid
    with DaemonControl() as control:
        assert control.status()["since"] == told["you"]["daemon"]["since"]


def test_without_a_broker_status_shows_ones_own_and_fails(own_home: Path, folder: Path) -> None:
    text = run("status", "--runtime", str(folder), code=os.EX_UNAVAILABLE)
    assert text.startswith("no keys: ")
    told = json.loads(run("status", "--json", "--runtime", str(folder), code=os.EX_UNAVAILABLE))
    assert told["broker"] is None and told["you"]["daemon"] is None


def test_capabilities_that_were_kept_are_called_so(own_home: Path, broker: RunningBroker) -> None:
    text = run("status", "--all", "--runtime", str(broker.folder))
    assert "capabilities kept: " in " ".join(text.split())
