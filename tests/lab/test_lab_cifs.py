"""`upcall lab cifs`: the demonstration, whole, on either kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upcall.testing.lab import why_not
from upcall.testing.lab.fileserver import missing

TIME_LIMIT = 900  # seconds: only against a machine that hangs
pytestmark = [
    pytest.mark.lab,
    pytest.mark.long,  # tests/kernel/test_cifs*.py see more of the same
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]


@pytest.mark.parametrize("kernel", ["uml", "qemu"])
def test_two_peoples_files_come_back_equal_and_a_stopped_daemons_mount_is_refused(tmp_path: Path, kernel: str) -> None:
    if reason := why_not(kernel):
        pytest.skip(f"the lab cannot run here: {reason}")
    command = [
        sys.executable,
        "-m",
        "upcall",
        "lab",
        "cifs",
        "--files=4",
        f"--timeout={TIME_LIMIT}",
        f"--kernel={kernel}",
        f"--results={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT + 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 files read back, all equal" in done.stdout
    assert "ETIMEDOUT" in done.stdout
    assert "the kernel's log is clean" in done.stdout
    assert "reason=no-ticket" in (tmp_path / "log").read_text()
