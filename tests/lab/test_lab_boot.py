"""What a command finds in the guest, and how its end reaches us. Every test here boots a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import upcall
from upcall.lab import LabTimedOut, MachineDied, Result, run, why_not

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"the lab cannot run here: {WHY_NOT}"),
]
TIME_LIMIT = 120.0  # for a busy machine; a quiet one needs a tenth


def script(text: str, results: Path | None = None) -> Result:
    return run(["sh", "-ec", text], timeout=TIME_LIMIT, results=results)


def test_one_run_from_the_first_to_the_last(tmp_path: Path) -> None:
    """Exit code, both outputs, results and the kernel's log."""
    done = script(
        """
        echo to-out; echo to-err >&2
        echo hello >/results/from-root
        su alice -c 'umask 022; echo hi >/results/from-alice'
        sleep 1000 & # holds the output open, and must not hold us up
        exit 7
        """,
        results=tmp_path / "results",
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"to-out\n", b"to-err\n")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "from-alice",
        "from-root",
        "kmsg",
    ]
    assert (tmp_path / "results" / "from-alice").read_text() == "hi\n"
    log = (tmp_path / "results" / "kmsg").read_text()
    assert log == done.kernel_log
    assert "Linux version" in log
    assert "the command ended with 7" in log
    assert done.kernel_faults == ()
    assert 0 < done.boot_seconds < done.seconds < TIME_LIMIT


def test_what_a_command_finds() -> None:
    done = script(
        """
        test -c /dev/ecryptfs
        grep -q ecryptfs /proc/filesystems
        modprobe quota_v2; lsmod | grep -q quota_v2
        modprobe -r quota_v2
        test "$(hostname)" = lab
        ping -c 1 -W 5 127.0.0.1 >/dev/null
        test "$HOME" = /home/root; touch ~/x
        test "$(id -u alice) $(id -u bob)" = "5001 5002"
        touch /usr/written /tmp/written /run/written /dev/shm/written
        ! su alice -c 'ls /home/bob' 2>/dev/null
        echo again >/dev/stdout
        test "$(cat /proc/1/comm)" = busybox
        grep -q '^SigIgn:.0000000000000000$' /proc/self/status
        (sleep 0.1 & exec sleep 0.2) # an orphan, for process 1 to reap
        sleep 0.2
        ! grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null
        echo fine
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"again\nfine\n", b"", 0)
    assert not Path("/usr/written").exists()


def test_everybody_has_this_python(tmp_path: Path) -> None:
    """From a folder below /tmp, which starts empty in the guest, and by a name that wants quoting."""
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    program = "import os, sys, upcall; print(os.getuid(), os.getcwd(), sys.prefix, upcall.__file__, sys.argv[1])"
    (folder / "program.py").write_text(program)
    command = """
        python program.py "$1"
        setpriv --reuid alice --clear-groups python program.py "$1"
        setpriv --reuid bob --regid bob --clear-groups python program.py "$1"
        """
    done = run(["sh", "-ec", command, "sh", "x 'y' \"z\""], timeout=TIME_LIMIT, cwd=folder)
    same = f"{folder} {sys.prefix} {upcall.__file__} x 'y' \"z\""
    assert done.stderr == b""
    assert done.stdout.decode().splitlines() == [f"{uid} {same}" for uid in (0, 5001, 5002)]


def test_output_is_complete_and_unmixed() -> None:
    program = """if True:
        import sys
        for _ in range(50000):
            sys.stdout.write("o" * 99 + "\\n")
        sys.stderr.write("e" * 300000)
        """
    done = run(["python", "-c", program], timeout=TIME_LIMIT)
    assert done.stdout == (b"o" * 99 + b"\n") * 50000
    assert done.stderr == b"e" * 300000


def test_a_time_limit_keeps_what_there_was(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LabTimedOut, match="the command had not ended"):
        run(["sh", "-c", "echo x >/results/early; sleep 1000"], timeout=25, results=tmp_path)
    assert time.monotonic() - began < 35
    assert (tmp_path / "early").read_text() == "x\n"
    assert "Linux version" in (tmp_path / "kmsg").read_text()


def test_a_panic_is_told_from_a_failing_command() -> None:
    with pytest.raises(MachineDied, match="sysrq triggered crash"):
        script("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 100")


# --- the command line ---------------------------------------------------------------------------


def upcall_lab_run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-c", "from upcall.cli import main; main()", "lab", "run", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def test_the_command_line_passes_on_streams_and_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = upcall_lab_run("--kernel-log", str(log), "--", "sh", "-c", "echo out; echo err >&2; exit 9")
    assert process.communicate(timeout=TIME_LIMIT) == (b"out\n", b"err\n")
    assert process.returncode == 9
    assert "Linux version" in log.read_text()


def test_the_command_lines_timeout_is_a_temporary_failure() -> None:
    process = upcall_lab_run("--timeout", "2", "--", "true")
    _, err = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, b"timed out" in err) == (os.EX_TEMPFAIL, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_machine_too(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = upcall_lab_run("--", "sh", "-c", "echo up; sleep 1000", env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    (machine,) = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(machine)
    if number != signal.SIGKILL:  # which leaves nobody to tidy up
        assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_nothing_is_left_behind() -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    script("true")
    assert not [path for path in set(Path(tempfile.gettempdir()).iterdir()) - before if "lab" in path.name]
