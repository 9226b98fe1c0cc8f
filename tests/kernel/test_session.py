"""`upcall setup` on a machine without systemd, and what PAM then does: root's su opens and closes real sessions."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import COMMON, CONFIG, NAMES, name_key, prepare_names, require_setup
from upcall.install.sessions.records import FOLDER
from upcall.process import machine
from upcall.testing.lab.stage import PATIENCE, broker_status, person, wait_until

SLOW = 5 * PATIENCE


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "upcall", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed() -> Iterator[str]:
    """Set up; what was said. Afterwards all must be as before."""
    require_setup()
    prepare_names("bob")
    before = COMMON.read_text()
    said = run("setup", "--request-key", "dns_resolver")
    try:
        yield said
    finally:
        told = run("setup", "--undo")
        CONFIG.unlink()
    assert COMMON.read_text() == before, told
    assert not Path("/etc/init.d/upcall").exists(), told


def daemon_of(uid: int) -> int | None:
    """The pid of the daemon that is registered."""
    found: list[dict[str, int]] = (broker_status() or {}).get("daemons", [])
    return next((one["pid"] for one in found if one["uid"] == uid), None)


@contextlib.contextmanager
def login(name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A session by su, which lasts until the end of the block."""
    process = subprocess.Popen(["su", "-l", name, "-c", "echo in; read line"], stdin=-1, stdout=-1)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        yield process
    finally:
        process.communicate(b"\n", timeout=SLOW)


def registered(uid: int, other_than: int | None = None) -> int:
    wait_until(lambda: daemon_of(uid) not in (None, other_than), f"a daemon of uid {uid}", SLOW)
    found = daemon_of(uid)
    assert found is not None
    return found


def gone(uid: int) -> None:
    wait_until(lambda: daemon_of(uid) is None, f"no daemon of uid {uid}", SLOW)


def test_the_machine_has_its_broker_and_its_daemon(installed: str) -> None:
    wait_until(lambda: broker_status() is not None, "the broker", SLOW)
    registered(machine.read())
    assert "pam_exec.so quiet seteuid type=open_session" in COMMON.read_text()


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed (Debian: man-db)")
def test_man_finds_the_pages(installed: str) -> None:
    for page in ("upcall(1)", "upcall-setup(8)", "upcall-config(5)"):
        found = subprocess.run(["man", "-w", page], capture_output=True, text=True, check=False)
        where = Path(found.stdout.strip()).resolve()  # /usr/local/man is the same folder
        assert where.is_relative_to("/usr/local/share/man"), f"{page}: {where} {found.stderr}"


@pytest.mark.skipif(
    not Path("/usr/share/bash-completion/bash_completion").exists(), reason="bash-completion is not installed"
)
def test_bash_finds_the_completion(installed: str) -> None:
    loaded = "source /usr/share/bash-completion/bash_completion; _completion_loader upcall; complete -p upcall"
    found = subprocess.run(["bash", "--norc", "-c", loaded], capture_output=True, text=True, check=False)
    assert "_upcall_completion" in found.stdout, found.stderr


def test_two_sessions_share_a_daemon_which_the_last_logout_ends(installed: str) -> None:
    alice = person("alice")
    with login("alice"):
        daemon = registered(alice.uid)
        with login("alice"):
            assert daemon_of(alice.uid) == daemon
            environment = Path(f"/proc/{daemon}/environ").read_bytes().split(b"\0")
            assert b"HOME=/home/alice" in environment
            assert f"XDG_RUNTIME_DIR=/run/user/{alice.uid}".encode() in environment
            assert os.getsid(daemon) == daemon
        assert daemon_of(alice.uid) == daemon
    gone(alice.uid)
    assert not (FOLDER / str(alice.uid)).exists()


def test_a_killed_daemon_starts_again_with_the_next_session(installed: str) -> None:
    alice, bob = person("alice"), person("bob")
    with login("alice"), login("bob"):
        daemon, other = registered(alice.uid), registered(bob.uid)
        os.kill(daemon, signal.SIGKILL)
        gone(alice.uid)
        with login("alice"):
            registered(alice.uid, other_than=daemon)
            assert daemon_of(bob.uid) == other
    gone(alice.uid)
    gone(bob.uid)


def test_a_killed_login_is_noticed_with_the_next_one(installed: str) -> None:
    alice = person("alice")
    with login("alice") as killed:
        registered(alice.uid)
        killed.kill()
        killed.wait()
    with login("bob"):
        gone(alice.uid)


def answered(names: Iterator[str]) -> bool:
    """Whether a request is answered for which a daemon has to be started first: the first one, within its six seconds.
    An emulated processor takes longer to start Python, and may need the next one."""
    if "User Mode Linux" in Path("/proc/cpuinfo").read_text():
        return name_key(next(names))
    wait_until(lambda: name_key(next(names)), "an answer", SLOW)
    return True


def test_a_daemon_is_started_for_a_request_of_the_kernel(installed: str) -> None:
    """Nobody is logged in; a logout is not its end; and one that was killed comes with the next request."""
    bob = person("bob")
    assert daemon_of(bob.uid) is None
    names = iter(NAMES)
    assert answered(names)
    daemon = registered(bob.uid)
    with login("bob"):
        assert daemon_of(bob.uid) == daemon
    assert name_key(next(names))
    assert daemon_of(bob.uid) == daemon
    os.kill(daemon, signal.SIGKILL)
    gone(bob.uid)
    assert answered(names)
    registered(bob.uid, other_than=daemon)
