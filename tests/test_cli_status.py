"""`upcall status --wait`: for scripts that need the daemon, with a real broker over sockets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from upcall.cli import main, status
from upcall.client import NoBroker
from upcall.testing.processes import RunningBroker, StartDaemon

ME = os.getuid()
DAEMON = {"uid": ME, "leaving": False}
OPEN = {"uid": ME, "open": True}


def run(folder: Path, patience: str) -> Result:
    return CliRunner().invoke(main, ["status", "--json", "--runtime", str(folder), "--wait", patience])


def test_wait_succeeds_with_a_daemon_and_times_out_without_one(
    broker: RunningBroker, start_daemon: StartDaemon
) -> None:
    missing = run(broker.folder, "0.1")
    assert missing.exit_code == os.EX_TEMPFAIL and f"uid {ME} has no daemon" in missing.stderr
    start_daemon(broker)
    assert run(broker.folder, "0").exit_code == 0


def test_wait_without_a_broker_is_an_error(folder: Path) -> None:
    assert run(folder, "0.1").exit_code == os.EX_UNAVAILABLE


def test_wait_continues_until_broker_daemon_and_device_are_ready(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    shown: list[dict[str, Any]] = [
        {"daemons": [], "devices": []},
        {"daemons": [{**DAEMON, "uid": ME + 1}], "devices": [{"uid": ME + 1, "open": True}]},
        {"daemons": [{**DAEMON, "leaving": True}], "devices": [OPEN]},
        {"daemons": [DAEMON], "devices": [{"uid": ME, "open": False, "why": "another daemon of this uid has it"}]},
        {"daemons": [DAEMON], "devices": [OPEN]},
    ]

    def one(_folder: Path | None) -> dict[str, Any]:
        if len(shown) == 5:
            shown.insert(0, {})
            raise NoBroker("none yet")
        return shown.pop(0) or shown.pop(0)

    monkeypatch.setattr(status, "_status", one)
    assert run(folder, "10").exit_code == 0
    assert shown == []


def test_wait_ignores_a_device_that_this_kernel_does_not_have(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    found = {"daemons": [DAEMON], "devices": [{"uid": ME, "open": False, "why": "[Errno 2] No such file"}]}
    monkeypatch.setattr(status, "_status", lambda _: found)
    assert run(folder, "0").exit_code == 0
