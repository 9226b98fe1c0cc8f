"""What a command finds in the guest, and how its end reaches us. Every test here boots a machine, on each kernel."""

from __future__ import annotations

import functools
import os
import pty
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import upcall
from upcall.testing.lab import LabTimedOut, MachineDied, Result, run, why_not

pytestmark = pytest.mark.lab
TIME_LIMIT = 120.0  # for a busy machine; a quiet one needs a tenth

cannot_run = functools.cache(why_not)


@pytest.fixture(params=["uml", "qemu"])
def kernel(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if reason := cannot_run(name):
        pytest.skip(f"the lab cannot run {name} here: {reason}")
    return name


def script(kernel: str, text: str, results: Path | None = None) -> Result:
    return run(["sh", "-ec", text], timeout=TIME_LIMIT, results=results, kernel=kernel)


def test_one_run_from_the_first_to_the_last(kernel: str, tmp_path: Path) -> None:
    """Exit code, both outputs, results and the kernel's log."""
    done = script(
        kernel,
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


def test_what_a_command_finds(kernel: str) -> None:
    done = script(
        kernel,
        """
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
        """,
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"again\nfine\n", b"", 0)
    assert not Path("/usr/written").exists()


def test_ecryptfs_has_its_device_under_qemu_only(kernel: str) -> None:
    done = script(kernel, "modprobe ecryptfs; grep -o ecryptfs /proc/filesystems; ls /dev/ecryptfs || :")
    assert done.stdout.decode().split() == ["ecryptfs", *(["/dev/ecryptfs"] if kernel == "qemu" else [])]


def test_modules_for_what_the_kernel_asks_of_user_space(kernel: str) -> None:
    done = script(kernel, "for module in cifs dns_resolver fuse quota_v2 loop ext4; do modprobe $module; done")
    assert (done.returncode, done.stderr) == (0, b"")


def test_everybody_has_this_python(kernel: str, tmp_path: Path) -> None:
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
    done = run(["sh", "-ec", command, "sh", "x 'y' \"z\""], timeout=TIME_LIMIT, cwd=folder, kernel=kernel)
    same = f"{folder} {sys.prefix} {upcall.__file__} x 'y' \"z\""
    assert done.stderr == b""
    assert done.stdout.decode().splitlines() == [f"{uid} {same}" for uid in (0, 5001, 5002)]


def test_output_is_complete_and_unmixed(kernel: str) -> None:
    program = """if True:
        import sys
        for _ in range(50000):
            sys.stdout.write("o" * 99 + "\\n")
        sys.stderr.write("e" * 300000)
        """
    done = run(["python", "-c", program], timeout=TIME_LIMIT, kernel=kernel)
    assert done.stdout == (b"o" * 99 + b"\n") * 50000
    assert done.stderr == b"e" * 300000


def test_every_byte_passes_as_it_is(kernel: str) -> None:
    """Serial lines and consoles have their own ideas about some."""
    make = "random.Random(7).randbytes(1 << 20)"
    program = f"import random, sys; sys.stdout.buffer.write({make}); sys.stderr.buffer.write({make}[::-1])"
    done = run(["python", "-c", program], timeout=TIME_LIMIT, kernel=kernel)
    expected = random.Random(7).randbytes(1 << 20)
    assert done.stdout == expected
    assert done.stderr == expected[::-1]


def test_output_waits_for_whoever_takes_it(kernel: str) -> None:
    """A reader that is slow costs nobody memory: the command is held up, and goes on."""
    taken: list[int] = []
    limit = 1 << 21

    def slowly(chunk: bytes) -> None:
        if not taken:
            select.select([], [], [], 1.0)
        taken.append(len(chunk))

    program = ["head", "-c", str(limit), "/dev/zero"]
    done = run(program, timeout=TIME_LIMIT, out=slowly, kernel=kernel)
    assert (done.returncode, sum(taken), done.stdout) == (0, limit, b"")
    assert max(taken) <= 1 << 16


def test_a_time_limit_keeps_what_there_was(kernel: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LabTimedOut, match="the command had not ended"):
        run(["sh", "-c", "echo x >/results/early; sleep 1000"], timeout=25, results=tmp_path, kernel=kernel)
    assert time.monotonic() - began < 35
    assert (tmp_path / "early").read_text() == "x\n"
    assert "Linux version" in (tmp_path / "kmsg").read_text()


def test_a_panic_is_told_from_a_failing_command(kernel: str) -> None:
    with pytest.raises(MachineDied, match="sysrq triggered crash"):
        script(kernel, "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 100")


# --- the command line ---------------------------------------------------------------------------


UPCALL_LAB = [sys.executable, "-c", "from upcall.cli import main; main()", "lab"]


def upcall_lab_run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    line = [*UPCALL_LAB, "run", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def test_the_command_line_passes_on_streams_and_code(kernel: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["sh", "-c", "echo out; echo err >&2; exit 9"]
    process = upcall_lab_run("--kernel", kernel, "--kernel-log", str(log), "--", *command)
    assert process.communicate(timeout=TIME_LIMIT) == (b"out\n", b"err\n")
    assert process.returncode == 9
    assert "Linux version" in log.read_text()


def test_the_command_lines_timeout_is_a_temporary_failure(kernel: str) -> None:
    process = upcall_lab_run("--kernel", kernel, "--timeout", "2", "--", "sleep", "1000")
    _, err = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, b"timed out" in err) == (os.EX_TEMPFAIL, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_machine_too(number: signal.Signals, kernel: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = ["sh", "-c", "(while :; do :; done) & echo up; sleep 1000"]
    process = upcall_lab_run("--kernel", kernel, "--", *command, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    machine = [member for child in children(process.pid) for member in session(child)]
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(machine)
    if number != signal.SIGKILL:  # which leaves nobody to tidy up
        assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def session(leader: int) -> list[int]:
    """The processes of this one's session: User-mode Linux is several."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _state, _parent, _group, its, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its) == leader:
            found.append(int(folder.name))
    return found


def gone(pids: list[int]) -> bool:
    assert pids
    return all(ended(pid) for pid in pids)


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_nothing_is_left_behind(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script(kernel, "true")
    assert list(tmp_path.iterdir()) == []
    assert children(os.getpid()) == []


def test_the_shell_is_a_terminal_with_ctrl_c(kernel: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*UPCALL_LAB, "shell", "--kernel", kernel], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        expect(ours, b"# ")
        os.write(ours, b"sh -c \"stty -a | grep -o 'i''sig'; exec sleep 1000\"\r")
        expect(ours, b"isig")
        os.write(ours, b"\x03")
        expect(ours, b"# ")
        os.write(ours, b"exit 5\r")
        assert process.wait(TIME_LIMIT) == 5
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours)


def expect(terminal: int, wanted: bytes) -> None:
    got, deadline = b"", time.monotonic() + TIME_LIMIT
    while wanted not in got:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], got
        got += os.read(terminal, 1 << 12)
