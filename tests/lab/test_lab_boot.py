"""How a command's words and its end reach us from the guest. What can share a machine does: `machine` boots one for
all that only looks. Everything here runs on each of the lab's kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import pty
import random
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import upcall
from upcall.testing.lab import LabTimedOut, MachineDied, Result, carrier, run, why_not

pytestmark = pytest.mark.lab
TIME_LIMIT = 600.0  # only against a machine that hangs: a quiet one needs a twentieth

cannot_run = functools.cache(why_not)


@pytest.fixture(scope="module", params=["uml", "qemu"])
def kernel(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if reason := cannot_run(name):
        pytest.skip(f"the lab cannot run {name} here: {reason}")
    return name


# --- one machine for all that only looks ----------------------------------------------------------------------------


FILLED = (b"o" * 99 + b"\n") * 50000
FILL = """if True:
    import sys
    for _ in range(50000):
        sys.stdout.write("o" * 99 + "\\n")
    sys.stderr.write("e" * 300000)
    """
BYTES = random.Random(7).randbytes(1 << 20)
EVERY_BYTE = """if True:
    import random, sys
    made = random.Random(7).randbytes(1 << 20)
    sys.stdout.buffer.write(made)
    sys.stderr.buffer.write(made[::-1])
    """

# Each looks at one thing, and has its own outputs and exit code in /results.
PARTS = {
    "commands": """
        modprobe quota_v2; lsmod | grep -q quota_v2
        modprobe -r quota_v2
        ping -c 1 -W 5 127.0.0.1 >/dev/null
        """,
    "people": """
        test "$(hostname)" = lab
        test "$HOME" = /home/root; touch ~/x
        test "$(id -u alice) $(id -u bob)" = "5001 5002"
        ! su alice -c 'ls /home/bob' 2>/dev/null
        """,
    "writing": "touch /usr/written /tmp/written /run/written /dev/shm/written",
    "processes": """
        test "$(cat /proc/1/comm)" = busybox
        grep -q '^SigIgn:.0000000000000000$' /proc/self/status
        (sleep 0.1 & exec sleep 0.2) # an orphan, for process 1 to reap
        sleep 0.2
        ! grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null
        """,
    "ecryptfs": "modprobe ecryptfs; grep -o ecryptfs /proc/filesystems; ls /dev/ecryptfs || :",
    "modules": "for module in cifs dns_resolver fuse quota_v2 loop ext4; do modprobe $module; done",
    "python": """
        python program.py "$1"
        setpriv --reuid alice --clear-groups python program.py "$1"
        setpriv --reuid bob --regid bob --clear-groups python program.py "$1"
        """,
}
PROGRAM = "import os, sys, upcall; print(os.getuid(), os.getcwd(), sys.prefix, upcall.__file__, sys.argv[1])"
ARGUMENT = "x 'y' \"z\""

RUN_PARTS = "\n".join(f"part {name} {shlex.quote(text)}" for name, text in PARTS.items())
# The last commands write to the command's own outputs.
COMMAND = f"""
part() {{
    sh -ec "$2" sh "$argument" >/results/"$1".out 2>/results/"$1".err
    echo $? >/results/"$1".code
}}
argument=$1
{RUN_PARTS}
set -e
echo hello >/results/from-root
su alice -c 'umask 022; echo hi >/results/from-alice'
echo to-out; echo to-err >&2
echo again >/dev/stdout
python -c {shlex.quote(FILL)}
python -c {shlex.quote(EVERY_BYTE)}
sleep 1000 & # holds the output open, and must not hold us up
exit 7
"""


class Part(NamedTuple):
    """What one of PARTS ended with, and said."""

    code: int
    out: str
    err: str


class Seen(NamedTuple):
    """One run from the first to the last."""

    result: Result
    results: Path
    folder: Path  # where the command ran
    errors: list[bytes]  # its second output as a sink was given it, which was slow to take the first piece
    left: list[Path]  # temporary files that were there afterwards
    children: list[int]  # and processes

    def part(self, name: str) -> Part:
        code, out, err = ((self.results / f"{name}.{end}").read_text() for end in ("code", "out", "err"))
        return Part(int(code), out, err)


@pytest.fixture(scope="module")
def machine(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """From a folder below /tmp, which starts empty in the guest, and by a name that wants quoting."""
    folder = tmp_path_factory.mktemp("boot") / "a 'b' $c"
    temporary, results = folder.with_name("temporary"), folder.with_name("results")
    for made in (folder, temporary):
        made.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    errors: list[bytes] = []

    def slowly(chunk: bytes) -> None:
        if not errors:
            select.select([], [], [], 1.0)
        errors.append(chunk)

    before = children(os.getpid())
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(tempfile, "tempdir", str(temporary))
        command = ["sh", "-c", COMMAND, "sh", ARGUMENT]
        done = run(command, timeout=TIME_LIMIT, results=results, cwd=folder, err=slowly, kernel=kernel)
    left = [child for child in children(os.getpid()) if child not in before]
    return Seen(done, results, folder, errors, list(temporary.iterdir()), left)


def test_the_exit_code_is_the_commands(machine: Seen) -> None:
    assert machine.result.returncode == 7


def test_files_in_results_reach_the_host(machine: Seen) -> None:
    assert (machine.results / "from-root").read_text() == "hello\n"
    assert (machine.results / "from-alice").read_text() == "hi\n"
    parts = {f"{name}.{end}" for name in PARTS for end in ("code", "out", "err")}
    assert {path.name for path in machine.results.iterdir()} == {"from-root", "from-alice", "kmsg"} | parts


def test_the_kernels_log_reaches_the_host_and_has_no_faults(machine: Seen) -> None:
    log = (machine.results / "kmsg").read_text()
    assert log == machine.result.kernel_log
    assert "Linux version" in log
    assert "the command ended with 7" in log
    assert machine.result.kernel_faults == ()
    assert 0 < machine.result.boot_seconds < machine.result.seconds


def test_a_run_leaves_no_file_and_no_process(machine: Seen) -> None:
    assert machine.left == []
    assert machine.children == []


def test_a_command_finds_module_tools_and_a_network_of_its_own(machine: Seen) -> None:
    assert machine.part("commands") == Part(0, "", "")


def test_a_command_finds_people_with_closed_homes(machine: Seen) -> None:
    assert machine.part("people") == Part(0, "", "")


def test_a_command_writes_anywhere_and_the_host_does_not_see_it(machine: Seen) -> None:
    assert machine.part("writing") == Part(0, "", "")
    assert not Path("/usr/written").exists()


def test_process_1_reaps_orphans_and_no_signal_is_ignored(machine: Seen) -> None:
    assert machine.part("processes") == Part(0, "", "")


def test_ecryptfs_has_its_device_under_qemu_only(machine: Seen, kernel: str) -> None:
    device = ["/dev/ecryptfs"] if kernel == "qemu" else []
    assert machine.part("ecryptfs").out.split() == ["ecryptfs", *device]


def test_modules_for_what_the_kernel_asks_of_user_space_load(machine: Seen) -> None:
    assert machine.part("modules") == Part(0, "", "")


def test_each_user_has_this_python_and_its_libraries(machine: Seen) -> None:
    found = machine.part("python")
    assert found.err == ""
    same = f"{machine.folder} {sys.prefix} {upcall.__file__} {ARGUMENT}"
    assert found.out.splitlines() == [f"{uid} {same}" for uid in (0, 5001, 5002)]


def test_output_is_complete_unmixed_and_unchanged(machine: Seen) -> None:
    """Serial lines and consoles have their own ideas about some bytes."""
    assert machine.result.stdout == b"to-out\nagain\n" + FILLED + BYTES
    assert b"".join(machine.errors) == b"to-err\n" + b"e" * 300000 + BYTES[::-1]


def test_a_slow_sink_holds_the_command_up_and_gets_small_pieces(machine: Seen) -> None:
    assert max(map(len, machine.errors)) <= 1 << 16
    assert machine.result.stderr == b""


# --- machines that end early ----------------------------------------------------------------------------------------


def test_a_time_limit_keeps_what_there_was(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is over when the command has spoken, however long that took."""
    said: list[bytes] = []

    def clock() -> float:
        return time.monotonic() + (TIME_LIMIT if b"written" in b"".join(said) else 0.0)

    monkeypatch.setattr(carrier, "time", SimpleNamespace(monotonic=clock))
    command = ["sh", "-c", "echo x >/results/early; echo written; sleep 1000"]
    with pytest.raises(LabTimedOut, match="the command had not ended"):
        run(command, timeout=TIME_LIMIT, results=tmp_path, out=said.append, kernel=kernel)
    assert (tmp_path / "early").read_text() == "x\n"
    assert "Linux version" in (tmp_path / "kmsg").read_text()


@pytest.mark.long
def test_a_panic_is_told_from_a_failing_command(kernel: str) -> None:
    command = ["sh", "-ec", "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 1000"]
    with pytest.raises(MachineDied, match="sysrq triggered crash"):
        run(command, timeout=TIME_LIMIT, kernel=kernel)


# --- the command line -----------------------------------------------------------------------------------------------


UPCALL_LAB = [sys.executable, "-c", "from upcall.cli import main; main()", "lab"]


@contextlib.contextmanager
def upcall_lab_run(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`upcall lab run`; however the block is left, it has ended, and the machine with it."""
    line = [*UPCALL_LAB, "run", f"--timeout={TIME_LIMIT}", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """By a signal that lets it tidy up, if that helps."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.long
def test_the_command_line_passes_on_streams_and_code(kernel: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["sh", "-c", "echo out; echo err >&2; exit 9"]
    with upcall_lab_run("--kernel", kernel, "--kernel-log", str(log), "--", *command) as process:
        assert process.communicate(timeout=TIME_LIMIT) == (b"out\n", b"err\n")
        assert process.returncode == 9
    assert "Linux version" in log.read_text()


def test_the_command_lines_timeout_is_a_temporary_failure(kernel: str) -> None:
    with upcall_lab_run("--kernel", kernel, "--timeout", "2", "--", "sleep", "1000") as process:
        _, err = process.communicate(timeout=TIME_LIMIT)
        assert (process.returncode, b"timed out" in err) == (os.EX_TEMPFAIL, True)


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM, signal.SIGKILL],
)
def test_a_signal_ends_the_machine_too(number: signal.Signals, kernel: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = ["sh", "-c", "(while :; do :; done) & echo up; sleep 1000"]
    with upcall_lab_run("--kernel", kernel, "--", *command, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        machine = [pidfd for child in children(process.pid) for pidfd in session(child)]
        process.send_signal(number)
        process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert machine
    for pidfd in machine:
        assert select.select([pidfd], [], [], TIME_LIMIT)[0]
        os.close(pidfd)
    if number != signal.SIGKILL:  # which leaves nobody to tidy up
        assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def session(leader: int) -> list[int]:
    """pidfds of the processes of this one's session: User-mode Linux is several."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _state, _parent, _group, its, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its) == leader:
                found.append(os.pidfd_open(int(folder.name)))
    return found


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
        end(process)
        os.close(ours)


def expect(terminal: int, wanted: bytes) -> None:
    got, deadline = b"", time.monotonic() + TIME_LIMIT
    while wanted not in got:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], got
        got += os.read(terminal, 1 << 12)
