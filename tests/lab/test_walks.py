"""README.md's text, taken literally on fresh machines with Debian's systemd as process 1: tests/lab/readme_walk.py."""

from __future__ import annotations

import sys

import pytest

from release.build import ROOT
from tests import packed
from tests.kernel.groups import INIT
from upcall.testing.lab import run, why_not
from upcall.testing.lab.fileserver import missing

TIME_LIMIT = 3600.0  # seconds: only against a machine that hangs; a quiet one needs a tenth
REASON = why_not() or packed.why_not() or ("" if INIT.exists() else "not installed: systemd")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.long,
    pytest.mark.skipif(bool(REASON), reason=f"cannot run here: {REASON}"),
]


@pytest.mark.parametrize("name", ["ecryptfs", "cifs", "quota"])
def test_the_readme_leads_from_packages_to(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the commands, what they said, and what they took."""
    if name == "cifs" and (packages := missing()):
        pytest.skip(f"not installed: {', '.join(packages)}")
    made = packed.packages()
    packed.compiled(made)
    command = [sys.executable, "-m", "tests.lab.readme_walk", name, str(made)]

    def show(chunk: bytes) -> None:
        with capsys.disabled():
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()

    done = run(
        command, timeout=TIME_LIMIT, results=packed.FOLDER / f"walk-{name}", cwd=ROOT, out=show, err=show,
        env={"PYTHONUNBUFFERED": "1"}, init=INIT,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.kernel_faults == ()
