"""Every command with hostile values of every parameter, hostile standard streams, and signals: at most one line of
error, an exit code of sysexits.h, no traceback.

`tests/hostile_commands.py` makes the calls, and says which are cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall.cli import main
from upcall.process import start_python as startpython

PROJECT = Path(__file__).parents[1]
NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the user as whom commands run."""
    made = Path(tempfile.mkdtemp(prefix="upcall-hostile-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(made, NOBODY, NOBODY)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def as_ordinary(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as this user, or for root as an ordinary one, without a terminal. Skips where that one can read no
    Python with what is needed."""
    places = [str(PROJECT), *(str(one) for one in (PROJECT / "plugins").iterdir()), *filter(None, sys.path)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": os.pathsep.join(places)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    ordinary = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def run(python: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[no-any-return, call-overload]
            [python, *words],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1800,
            start_new_session=True,
            **ordinary,
        )

    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        try:
            if run(python, "-c", "import click, rich, upcall.cli, cryptography.hazmat.bindings._rust").returncode == 0:
                return run(python, *words)
        except OSError:
            continue
    pytest.skip("an ordinary user can read no Python with what is needed")


@pytest.mark.slow
def test_no_command_answers_hostile_values_with_more_than_a_line_and_an_exit_code(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = as_ordinary(home, "-m", "tests.hostile_commands", str(home / "all"))
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    with capsys.disabled():
        print(
            f"\nhostile values: {report['commands']} commands, {report['parameters']} options and arguments, "
            f"{report['calls']} calls; {report['streams']} with hostile streams; {len(report['failures'])} failures"
        )
    assert report["failures"] == []
    assert report["commands"] > 55 and report["parameters"] > 350


# --- values that were taken silently -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wrap", "x", "--timeout", "-3"], "'-3' is not a number of seconds above 0 to 86400"),
        (["wrap", "x", "--timeout", "nan"], "'nan' is not a number of seconds"),
        (["wrap", "x", "--timeout", "inf"], "'inf' is not a number of seconds"),
        (["wrap", "x", "--timeout", "1e10"], "'1e10' is not a number of seconds"),
        (["wrap", "x", "--uid", "-1"], "-1 is not in the range 0<=x<=4294967294"),
        (["wrap", "x", "--uid", "99999999999"], "99999999999 is not in the range"),
        (["daemon", "--runtime", "/nonexistent"], "directory '/nonexistent' does not exist"),
        (["daemon", "--pinentry", "/nonexistent"], "'/nonexistent' is no program that can be run"),
        (["daemon", "--pinentry", "/etc/passwd"], "'/etc/passwd' is no program that can be run"),
        (["daemon", "--pin-time", "nan"], "'nan' is not a number of seconds from 0 to 1000000000, or inf"),
        (["daemon", "--prompt-time", "inf"], "'inf' is not a number of seconds from 5 to 3600"),
        (["plugin", "check", "openssl", "--timeout", "-1"], "'-1' is not a number of seconds"),
        (["log", "--service", "kye"], "there is no service 'kye'; did you mean 'key'?"),
        (["log", "--service", "zzz"], "there is no service 'zzz': there are ecryptfs, key, "),
        (["log", "--outcome", "loked"], "did you mean 'locked'?"),
        (["log", "--uid", "-1"], "-1 is not in the range"),
        (["setup", "--root", ""], "the path is empty"),
        (["lab", "run", "--timeout", "nan", "true"], "'nan' is not a number of seconds"),
        (["status", "--wait", "nan"], "'nan' is not a number of seconds"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_a_value_that_makes_no_sense_is_refused_with_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(main, words, prog_name="upcall")
    assert done.exit_code == os.EX_USAGE and not done.stdout
    first, hint = done.stderr.splitlines()
    assert first.startswith("upcall: ") and said.lower() in first.lower()
    assert hint.startswith("Try `upcall ") and hint.endswith(" --help`.")


# --- real processes ------------------------------------------------------------------------------------------------


def upcall(arguments: Sequence[str], redirected: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    command = startpython.command("upcall", *arguments)
    words = ["/bin/sh", "-c", f'exec "$@" {redirected}', "sh", *command]
    return subprocess.run(words, capture_output=True, timeout=60, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("arguments", "redirected", "code", "said"),
    [
        (["wrap", "0123456789abcdef"], "<&-", os.EX_IOERR, b"upcall: standard input: it is closed\n"),
        (["wrap", "0123456789abcdef"], "</dev/null", os.EX_USAGE, b"upcall: standard input has no bytes"),
        (["config", "show"], ">/dev/full", os.EX_IOERR, b"upcall: standard output: No space left on device\n"),
        (["config", "show"], ">&-", os.EX_IOERR, b"upcall: standard output: it is closed\n"),
        (["--help"], ">/dev/full", os.EX_IOERR, b"upcall: standard output: No space left on device\n"),
        (["config", "show"], "2>&-", os.EX_OK, b""),
        (["nosuch"], "2>&-", os.EX_USAGE, b""),
        (["nosuch"], "2>/dev/full", os.EX_USAGE, b""),
        (["nosuch"], "<&- >&- 2>&-", os.EX_USAGE, b""),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else one.replace("/", "") if isinstance(one, str) else "",
)
def test_closed_and_full_streams_are_told_of_in_one_line(
    arguments: list[str], redirected: str, code: int, said: bytes
) -> None:
    done = upcall(arguments, redirected)
    assert (done.returncode, done.stderr[: len(said)]) == (code, said)
    assert done.stderr.count(b"\n") == (1 if said else 0)


def test_a_closed_pipe_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["--help"], ["config", "show"], ["manual"], ["status", "--help"]):
        done = subprocess.run(
            startpython.command("upcall", *words), stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    os.close(writer)


@pytest.mark.parametrize("words", [["-m", "upcall"], ["-c", "from upcall.__main__ import main; main()"]])
def test_ctrl_c_while_the_program_is_imported_ends_it_without_a_word(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "click.py").write_text("print('importing', flush=True)\ninput()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    command = [sys.executable, *words, "--version"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT  # 130 in a shell
        assert process.stderr.read() == b""


def test_the_installed_program_begins_where_ctrl_c_is_taken_care_of() -> None:
    [script] = entry_points(group="console_scripts", name="upcall")
    assert script.value == "upcall.__main__:main"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_command_that_waits_ends_at_a_signal_without_a_word(number: signal.Signals, code: int) -> None:
    command = startpython.command("upcall", "log", "-")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"time")  # it reads now
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr.read() == b""
