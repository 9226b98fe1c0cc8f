"""Which command starts a daemon for a request. That it is run is in test_reload_broker.py and ring 3."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcall.broker import launcher as starter


def test_the_start_command_is_systemds_if_systemd_runs_and_ours_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(starter, "_SYSTEMD_RUNS", tmp_path)
    assert starter.usual() == starter.COMMAND == ("systemctl", "start", "user@{uid}.service")
    monkeypatch.setattr(starter, "_SYSTEMD_RUNS", tmp_path / "not")
    assert starter.usual()[1:] == ("-I", "-m", "upcall.install.sessions", "start", "{uid}")
