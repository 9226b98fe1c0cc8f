"""The benchmarks run and print rows with the agreed fields; the figures themselves are not checked."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"group", "name", "unit", "ours", "peer", "peer_is", "ratio", "goal", "met", "note", "spread", "unsure"}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) for the peers")
def test_the_quickest_group_runs_and_its_json_has_the_agreed_fields(tmp_path: Path) -> None:
    found = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "pyroute2", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())
    assert set(rows) == {"machine", "rows"}
    assert rows["machine"]["processors"] >= 1
    assert sys.executable in rows["machine"]["interpreter"]
    assert "spread by" in rows["machine"]["drift"]
    (row,) = rows["rows"]
    assert set(row) == FIELDS
    assert row["peer_is"] == "pyroute2"
    assert row["name"] in done.stdout
    heads = [line.split()[0] for line in done.stdout.splitlines()[:3]]
    assert heads == ["interpreter", "processors", "load"]
    assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("ours", "peer", "ratio"))


def test_the_isolation_benchmark_finds_its_no_op_module_in_an_isolated_process() -> None:
    """Root's children run with -I, and the module lies beside the benchmarks."""
    command = [sys.executable, "-m", "bench", "--quick", "--only", "isolation"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "multiprocessing.Pipe" in ran.stdout


def test_without_a_c_compiler_the_benchmark_exits_with_a_plain_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--only", "pyroute2"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no C compiler" in done.stderr
    assert "Traceback" not in done.stderr
