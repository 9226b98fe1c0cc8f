"""The life of an installation from Debian packages, with Debian's systemd as process 1: tests/lab/deb_walk.py."""

from __future__ import annotations

import sys

import pytest

from release.build import ROOT
from tests import packed
from tests.kernel.groups import INIT
from upcall.testing.lab import run, why_not

TIME_LIMIT = 5400.0  # seconds: only against a machine that hangs; a quiet one needs a tenth
REASON = why_not() or packed.why_not() or ("" if INIT.exists() else "not installed: systemd")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.long,
    pytest.mark.skipif(bool(REASON), reason=f"cannot run here: {REASON}"),
]


def test_installed_logged_in_mounted_upgraded_removed_purged(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what each step took."""
    older = packed.packages()
    target = older.with_suffix(".newer")
    if not target.exists():
        packed.newer(older, target, "9.1.0")
    results = packed.FOLDER / "walk"
    command = [sys.executable, "-m", "tests.lab.deb_walk", str(older), str(target)]

    def show(chunk: bytes) -> None:
        with capsys.disabled():
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()

    done = run(
        command, timeout=TIME_LIMIT, results=results, cwd=ROOT, out=show, err=show,
        env={"PYTHONUNBUFFERED": "1"}, init=INIT,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.kernel_faults == ()
