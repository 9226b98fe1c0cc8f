"""The parts of the test suite, run beside each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import run_parts
from tests.run_parts import Part

HERE = Path(__file__).parent
GOOD = Part("good", "part_good", ())
BAD = Part("bad", "part_bad", ("4",))
HANGING = Part("hanging", "part_hanging", ())


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part_good.py").write_text("print('it is\\nwell')")
    (tmp_path / "part_bad.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    (tmp_path / "part_hanging.py").write_text("import signal; print('up', flush=True); signal.pause()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run_parts, "OUTPUT", tmp_path / "output")


def _run(monkeypatch: pytest.MonkeyPatch, *queues: tuple[Part, ...]) -> int:
    monkeypatch.setattr(run_parts, "QUEUES", queues)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run_parts.main([])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_each_line_names_its_part_and_the_table_has_every_part(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    assert _run(monkeypatch, (GOOD, GOOD._replace(name="again")), (GOOD._replace(name="beside"),)) == 0
    told = capfdbinary.readouterr().out.decode()
    for name in ("good", "again", "beside"):
        assert f"{name:8} it is\n" in told
        assert f"{name:8} well\n" in told
        assert f"\n{name:10} {0:9} " in told
    assert (tmp_path / "output" / "beside.log").read_text() == "it is\nwell\n"


def test_a_failing_part_stops_no_other_and_its_exit_code_is_returned(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert _run(monkeypatch, (BAD, GOOD), (BAD._replace(name="worse", arguments=("5",)),)) == 4
    assert b"good     well\n" in capfdbinary.readouterr().out


def test_sigterm_ends_the_running_parts_and_starts_no_others(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests import run_parts\n"
        "from tests.test_run_parts import GOOD, HANGING\n"
        "run_parts.OUTPUT = Path(sys.argv[1]); run_parts.QUEUES = ((HANGING, GOOD),); sys.exit(run_parts.main([]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "output")]
    with subprocess.Popen(command, cwd=HERE.parent, env=dict(os.environ), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging  up\n"
        process.send_signal(signal.SIGTERM)
        assert b"good" not in process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
