"""`upcall lab ecryptfs`: the demonstration, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upcall.testing.lab import why_not

WHY_NOT = why_not()
TIME_LIMIT = 900  # seconds: only against a machine that hangs
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"the lab cannot run here: {WHY_NOT}"),
]


def test_three_peoples_files_come_back_equal_and_a_killed_daemons_requests_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "upcall", "lab", "ecryptfs", "--files=8"]
    command += [f"--timeout={TIME_LIMIT}", f"--results={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT + 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 files read back by 3 people at once, all equal" in done.stdout
    assert "the kernel's log is clean" in done.stdout
    assert "daemon-gone" in done.stdout
    assert "device-opened uid=5001" in (tmp_path / "log").read_text()
