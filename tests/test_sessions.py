"""Sessions are counted with real processes in the place of login programs and daemons; for any user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from upcall.core.errors import UsageError
from upcall.install.sessions import starting
from upcall.install.sessions.__main__ import SessionEvent, take
from upcall.install.sessions.records import Records, SessionProcess, SessionRecord, process
from upcall.testing.gate import Gate
from upcall.testing.processes import until

UID, OTHER = 4711, 4712
Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Processes that end when they are told to, or with the test."""
    running = []

    def one() -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(["sleep", "60"]))
        return running[-1]

    yield one
    for started in running:
        started.kill()
        started.wait()


@pytest.fixture
def records(folder: Path) -> Records:
    return Records(folder / "sessions")


def of(started: subprocess.Popen[bytes]) -> SessionProcess:
    found = process(started.pid)
    assert found is not None
    return found


def never() -> int:
    raise AssertionError("there is a daemon already")


def terminated(started: subprocess.Popen[bytes]) -> bool:
    return started.wait(60) == -signal.SIGTERM


# --- counting ------------------------------------------------------------------------------------------------------


def test_two_sessions_share_a_daemon_and_the_last_ends_it(records: Records, start: Start) -> None:
    first, second, daemon = start(), start(), start()
    with records.held():
        records.opened(UID, of(first), lambda: daemon.pid)
        records.opened(UID, of(second), never)
        records.closed(UID, of(first))
        assert daemon.poll() is None
        assert records.read(UID) == SessionRecord(of(daemon), (of(second),))
        records.closed(UID, of(second))
        assert terminated(daemon)
        assert records.read(UID) == SessionRecord()


def test_two_sessions_of_one_program_count_as_two(records: Records, start: Start) -> None:
    who, daemon = start(), start()
    with records.held():
        records.opened(UID, of(who), lambda: daemon.pid)
        records.opened(UID, of(who), never)
        records.closed(UID, of(who))
        assert daemon.poll() is None
        records.closed(UID, of(who))
        assert terminated(daemon)


def test_a_broker_that_asks_twice_for_a_daemon_counts_once(records: Records, start: Start) -> None:
    """A daemon started for requests outlives sessions, and ends with the broker."""
    broker, who, daemon, next_one = start(), start(), start(), start()
    with records.held():
        records.opened(UID, of(broker), lambda: daemon.pid, once=True)
        records.opened(UID, of(broker), never, once=True)
        records.opened(UID, of(who), never)
        records.closed(UID, of(who))
        assert records.read(UID) == SessionRecord(of(daemon), (of(broker),))
        daemon.kill()
        until(lambda: process(daemon.pid) is None, "the daemon's end")
        records.opened(UID, of(broker), lambda: next_one.pid, once=True)
        assert records.read(UID) == SessionRecord(of(next_one), (of(broker),))
        broker.kill()
        broker.wait()
        records.sweep()
        assert terminated(next_one)


def test_the_last_session_of_one_uid_leaves_another_uids_daemon_alone(records: Records, start: Start) -> None:
    who, daemon, others = start(), start(), start()
    with records.held():
        records.opened(UID, of(who), lambda: daemon.pid)
        records.opened(OTHER, of(who), lambda: others.pid)
        records.closed(UID, of(who))
        assert terminated(daemon) and others.poll() is None


def test_a_daemon_that_was_killed_starts_again_with_the_next_session(records: Records, start: Start) -> None:
    first, second, daemon, next_one = start(), start(), start(), start()
    with records.held():
        records.opened(UID, of(first), lambda: daemon.pid)
        daemon.kill()
        until(lambda: process(daemon.pid) is None, "the daemon's end")  # a zombie: nobody has waited for it yet
        records.opened(UID, of(second), lambda: next_one.pid)
        assert records.read(UID).daemon == of(next_one)


def test_a_killed_login_is_swept_and_its_daemon_ended(records: Records, start: Start) -> None:
    who, daemon = start(), start()
    with records.held():
        records.opened(UID, of(who), lambda: daemon.pid)
        records.sweep()
        assert daemon.poll() is None
        who.kill()
        who.wait()
        records.sweep()
        assert terminated(daemon)


def test_a_killed_login_does_not_keep_the_daemon_from_ending(records: Records, start: Start) -> None:
    first, second, daemon = start(), start(), start()
    with records.held():
        for who in (first, second):
            records.opened(UID, of(who), lambda: daemon.pid)
        first.kill()
        first.wait()
        records.closed(UID, of(second))
        assert terminated(daemon)


def test_a_reused_pid_is_neither_counted_nor_ended(records: Records, start: Start, folder: Path) -> None:
    bystander = start()
    with records.held():
        written = f"daemon {bystander.pid} 1\nsession {bystander.pid} 1\n"
        (folder / "sessions" / str(UID)).write_text(written)
        assert records.read(UID) == SessionRecord()
        records.sweep()
        SessionProcess(bystander.pid, 1).end()
    assert bystander.poll() is None
    assert not (folder / "sessions" / str(UID)).exists()


def test_the_end_of_a_session_that_was_not_counted_is_ignored(records: Records, start: Start) -> None:
    who, stranger, daemon = start(), start(), start()
    with records.held():
        records.opened(UID, of(who), lambda: daemon.pid)
        records.closed(UID, of(stranger))
        records.closed(OTHER, of(stranger))
        assert daemon.poll() is None


def test_a_daemon_that_cannot_be_started_does_not_uncount_the_session(records: Records, start: Start) -> None:
    who = start()

    def fails() -> int:
        raise OSError("no memory")

    with records.held():
        with pytest.raises(OSError, match="no memory"):
            records.opened(UID, of(who), fails)
        assert records.read(UID) == SessionRecord(None, (of(who),))


@pytest.mark.parametrize(
    "data", [b"", b"daemon", b"daemon x y\n", b"session 1\n\xff\xff", b"\0" * 99, b"daemon -1 0\n"]
)
def test_a_broken_record_counts_as_empty(records: Records, start: Start, folder: Path, data: bytes) -> None:
    who, daemon = start(), start()
    with records.held():
        (folder / "sessions" / str(UID)).write_bytes(data)
        records.opened(UID, of(who), lambda: daemon.pid)
        assert records.read(UID) == SessionRecord(of(daemon), (of(who),))


def test_the_lock_of_a_killed_process_is_released(records: Records, folder: Path, start: Start) -> None:
    holder = f"""
import pathlib, signal
from upcall.install.sessions.records import Records
with Records(pathlib.Path({str(folder / "sessions")!r})).held():
    print("held", flush=True)
    signal.pause()
"""
    held = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE)
    assert held.stdout is not None and held.stdout.readline() == b"held\n"
    got = threading.Event()

    def take_it() -> None:
        with records.held():
            got.set()

    waiting = threading.Thread(target=take_it)
    waiting.start()
    assert not got.wait(0.1)
    held.kill()
    held.communicate()
    assert got.wait(60)
    waiting.join()


def test_a_folder_that_others_can_write_to_is_refused(records: Records, folder: Path) -> None:
    (folder / "sessions").mkdir(parents=True)
    (folder / "sessions").chmod(0o777)
    with pytest.raises(UsageError, match="folder of our own"), records.held():
        pass


# --- what PAM says -------------------------------------------------------------------------------------------------

PAM = {"PAM_TYPE": "open_session", "PAM_USER": "alice", "PAM_SERVICE": "login"}


def test_pams_environment_gives_event_user_and_service() -> None:
    assert take(["open"], PAM) == SessionEvent("open", "alice", "login")
    assert take(["close"], {**PAM, "PAM_TYPE": "close_session"}) == SessionEvent("close", "alice", "login")
    assert take(["open"], {**PAM, "PAM_SERVICE": "sshd"}) == SessionEvent("open", "alice", "sshd")


def test_cron_and_at_jobs_are_not_counted_unless_configured() -> None:
    assert take(["open"], {**PAM, "PAM_SERVICE": "cron"}) is None
    assert take(["open", "also=cron"], {**PAM, "PAM_SERVICE": "cron"}) == SessionEvent("open", "alice", "cron")
    assert take(["open", "also=cron"], {**PAM, "PAM_SERVICE": "atd"}) is None


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ([], {}),
        (["begin"], {}),
        (["close"], {}),
        (["open"], {"PAM_TYPE": "auth"}),
        (["open"], {"PAM_USER": ""}),
        (["open"], {"PAM_USER": "../root"}),
        (["open"], {"PAM_USER": "a:b"}),
        (["open"], {"PAM_USER": "a\nb"}),
        (["open"], {"PAM_USER": "x" * 257}),
    ],
    ids=[
        "no word",
        "another word",
        "the word of the other event",
        "another type",
        "no user",
        "a path",
        "a colon",
        "a newline",
        "a long user",
    ],
)
def test_a_malformed_event_is_refused(arguments: list[str], change: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        take(arguments, {**PAM, **change})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "upcall.install.sessions", *(arguments or ("open",))]
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_without_pam_the_command_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == os.EX_USAGE and "pam_exec" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="it would count a session")
def test_without_root_the_command_is_a_usage_error() -> None:
    done = run(**PAM)
    assert done.returncode == os.EX_USAGE and "root" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="others are told to be root")
def test_an_unknown_user_does_not_fail_the_login() -> None:
    done = run(**{**PAM, "PAM_USER": "nobody-of-that-name"})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="others are told to be root")
def test_a_login_does_not_wait_for_work_that_hangs(gate: Gate) -> None:
    hangs = f"""
import socket, sys
from upcall.install.sessions import __main__ as sessions
def work(*_):
    with socket.socket(socket.AF_UNIX) as there:
        there.connect({str(gate.path)!r})
        there.recv(1)
sessions.work, sessions.PATIENCE = work, 0.05
sys.exit(sessions.run(["open"]))
"""
    environment = {**os.environ, **PAM}
    done = subprocess.run([sys.executable, "-c", hangs], env=environment, timeout=60, check=False, capture_output=True)
    assert done.returncode == 0
    gate.arrived().release()  # it goes on alone


@pytest.mark.skipif(os.geteuid() != 0, reason="others are told to be root")
@pytest.mark.parametrize("ending", ["raise MemoryError", "os._exit(9)"])
def test_a_login_does_not_fail_by_work_that_fails(ending: str) -> None:
    fails = f"""
import os, sys
from upcall.install.sessions import __main__ as sessions
def work(*_):
    {ending}
sessions.work = work
sys.exit(sessions.run(["open"]))
"""
    environment = {**os.environ, **PAM}
    done = subprocess.run([sys.executable, "-c", fails], env=environment, timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("uid", ["0", "4294967290"])
def test_no_daemon_is_started_on_request_for_root_or_an_unknown_uid(uid: str) -> None:
    done = run("start", uid)
    assert done.returncode == os.EX_UNAVAILABLE and done.stderr.startswith(f"upcall session: uid {uid}: ")


@pytest.mark.parametrize("arguments", [("start",), ("start", "-1"), ("start", "alice"), ("start", "1", "2")])
def test_a_malformed_uid_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).returncode == os.EX_USAGE


@pytest.mark.parametrize("user", ["", "nobody-of-that-name", "../etc", ".", "a/b", "$(id)", "-x"])
def test_the_documented_hook_does_nothing_for_users_without_a_private_folder(user: str) -> None:
    script = Path(__file__).parents[1] / "docs" / "private" / "private"
    environment = {"PAM_USER": user, "PAM_TYPE": "open_session"}
    done = subprocess.run(["sh", script], env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- the daemon ----------------------------------------------------------------------------------------------------


def test_a_started_daemon_gets_home_and_runtime_folder_and_inherits_nothing() -> None:
    import pwd

    found = starting.environment(pwd.getpwuid(os.getuid()), Path("/run/user/4711"))
    assert found["HOME"] == pwd.getpwuid(os.getuid()).pw_dir
    assert found["XDG_RUNTIME_DIR"] == "/run/user/4711"
    assert not {"LD_PRELOAD", "PYTHONPATH", "KRB5CCNAME"} & found.keys()
