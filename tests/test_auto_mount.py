"""Mounts that follow logins and events: which commands the daemon runs, and that it waits for none for long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from upcall.process import start_python
from upcall.process.logind import LOGOUT, SCREEN_LOCK, SUSPEND
from upcall.protocols.ecryptfs import auto_mount
from upcall.protocols.ecryptfs.auto_mount import AutoMount
from upcall.testing.processes import until


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which the played command writes its words; it fails for `lock`."""
    file = tmp_path / "told"
    code = f"import sys; open({str(file)!r}, 'a').write(' '.join(sys.argv[2:]) + '\\n'); sys.exit('lock' in sys.argv)"
    monkeypatch.setattr(start_python, "command", lambda module, *words: [sys.executable, "-c", code, module, *words])
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mounts"
    made.mkdir()
    return made


class Logged:
    """A log that keeps events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))


def test_a_login_and_events_run_the_commands(told: Path, folder: Path) -> None:
    (folder / "private.toml").touch()
    log = Logged()
    mounts = AutoMount(folder, log)  # type: ignore[arg-type]
    mounts.at_login()
    until(lambda: len(log.events) == 1, "the first")
    mounts.on_event(True, LOGOUT)
    mounts.on_event(False, SCREEN_LOCK)
    until(lambda: len(log.events) == 3, "the others")
    assert told.read_text().splitlines() == ["mount --login", "umount --on logout", "mount --login"]
    assert {event for event, _ in log.events} == {"mounts-updated"}


@pytest.mark.parametrize("cause", [SUSPEND, SCREEN_LOCK])
def test_a_command_that_fails_is_logged(told: Path, folder: Path, cause: str) -> None:
    (folder / "private.toml").touch()
    log = Logged()
    AutoMount(folder, log).on_event(True, cause)  # type: ignore[arg-type]
    until(lambda: log.events, "it is logged")
    assert told.read_text() == "umount --on lock\n"
    assert log.events == [("mounts-failed", {"command": "umount --on lock", "status": 1})]


def test_without_mounts_no_process_is_started(told: Path, folder: Path) -> None:
    log = Logged()
    for place in (None, folder, folder / "missing"):
        mounts = AutoMount(place, log)  # type: ignore[arg-type]
        mounts.at_login()
        mounts.on_event(True, LOGOUT)
    (folder / ".private.toml.new").touch()
    AutoMount(folder, log).on_event(True, LOGOUT)  # type: ignore[arg-type]
    assert log.events == [] and not told.exists()


def test_a_command_that_hangs_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "private.toml").touch()
    monkeypatch.setattr(auto_mount, "_PATIENCE", 0.2)
    code = "import signal; signal.pause()"
    monkeypatch.setattr(start_python, "command", lambda *_: [sys.executable, "-c", code])
    log = Logged()
    AutoMount(folder, log).on_event(True, LOGOUT)  # type: ignore[arg-type]
    until(lambda: log.events, "it is logged")
    assert log.events == [("mounts-failed", {"command": "umount --on logout", "status": -9})]
