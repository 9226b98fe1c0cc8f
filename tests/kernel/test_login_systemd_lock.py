"""The real logind on the real system bus: what it says when a screen is locked, when the machine sleeps, at a logout.

Where systemd is process 1. The daemon has no broker here: what is locked is seen by its own status.
"""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.login_scene import have_login_wait
from upcall.kernel import keyring
from upcall.process.control import DaemonControl
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.ecryptfs.settings import LockSettings
from upcall.testing.lab.stage import PATIENCE, Person, do_as, person, wait_until
from upcall.testing.processes import ONLY_AGENT

SLOW = 5 * PATIENCE
SIGNATURE = "0123456789abcdef"
UNIT = Path("/run/systemd/system/lab-lock.service")
PATIENT = Path("/run/systemd/logind.conf.d/lab-lock.conf")
SLEEPING = Path("/run/systemd/system/systemd-suspend.service.d/lab.conf")


def tell(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SLOW)
    return done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    if Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("systemd is not process 1")
    have_login_wait()
    # The delay that a daemon may ask for before a sleep: an emulated processor can need more than five seconds.
    PATIENT.parent.mkdir(parents=True, exist_ok=True)
    PATIENT.write_text("[Login]\nInhibitDelayMaxSec=120\n")
    said = tell("systemctl", "start", "dbus.service") + tell("systemctl", "restart", "systemd-logind.service")
    assert not said, said


def sandbox() -> str:
    """What our unit for users' daemons allows. This one waits for no broker, and so is never ready."""
    lines = resources.files("upcall.install").joinpath("units/upcall-daemon.service.in").read_text().splitlines()
    service = lines[lines.index("[Service]") + 1 : lines.index("[Install]")]
    kept = [
        line for line in service if not line.startswith(("#", "Type=", "ExecStart=", "Restart", "Watchdog", "Timeout"))
    ]
    assert any(line.startswith("SystemCallFilter=") for line in kept)
    return "\n".join(kept) + "\n"


class House:
    """Alice's daemon, sandboxed as by our unit, and what it says."""

    def __init__(self, alice: Person, folder: Path) -> None:
        self.alice, self.log_file = alice, folder / "log"
        self._runtime = folder / "runtime"
        self._runtime.mkdir(0o700)
        os.chown(self._runtime, alice.uid, alice.gid)
        locking = LockSettings(causes=("suspend", "screen-lock", "logout"))
        settings = dumps(ONLY_AGENT._replace(folder=folder / "nowhere", locking=locking))
        UNIT.write_text(
            f"[Service]\nUser={alice.name}\nEnvironment=XDG_RUNTIME_DIR={self._runtime}\n"
            f"ExecStart={sys.executable} -I -m upcall.daemon '{settings}'\n"
            f"StandardError=append:{self.log_file}\n" + sandbox()
        )
        said = tell("systemctl", "daemon-reload") + tell("systemctl", "start", UNIT.name)
        assert not said, said
        wait_until(lambda: "logind-listening" in self.log, "it listens", SLOW)

    def end(self) -> None:
        tell("systemctl", "stop", UNIT.name)
        UNIT.unlink()

    def _here(self) -> None:
        os.environ["XDG_RUNTIME_DIR"] = str(self._runtime)

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def ask(self) -> dict[str, Any]:
        def status() -> dict[str, Any]:
            self._here()
            with DaemonControl() as control:
                return control.status()

        return do_as(self.alice, status)

    def unlock(self) -> None:
        """A passphrase to forget, of a key that no module opens."""

        def give() -> None:
            self._here()
            keyring.add_user_key(SIGNATURE, pack_auth_tok(AuthTok(SIGNATURE, "none", b"")))
            with DaemonControl() as control:
                control.unlock(SIGNATURE, bytearray(b"correct horse"))

        do_as(self.alice, give)

    def held(self, *causes: str) -> None:
        wait_until(lambda: self.ask()["held"] == list(causes), f"locked for {causes}: {self.log}", SLOW)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    made = House(person("alice"), tmp_path)
    try:
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def login(who: Person) -> Iterator[str]:
    """A session on a terminal; its id."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", "--wait", "login", "-f", who.name]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={})
    os.close(theirs)
    try:
        wait_until(lambda: bool(sessions(who)), "a session", SLOW)
        yield sessions(who)[0]
        os.write(ours, b"exit\n")
        process.wait(SLOW)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def sessions(who: Person) -> list[str]:
    listed = tell("loginctl", "list-sessions", "--no-legend", "--no-pager")
    return [line.split()[0] for line in listed.splitlines() if line.split()[1:2] == [str(who.uid)]]


def test_a_session_is_locked_and_unlocked_and_the_last_one_ends(house: House) -> None:
    with login(house.alice) as session:
        house.unlock()
        tell("loginctl", "lock-session", session)
        house.held("screen-lock")
        assert "keys-locked why=screen-lock forgotten=1" in house.log
        tell("loginctl", "unlock-session", session)
        house.held()
        tell("loginctl", "lock-sessions")
        house.held("screen-lock")
        tell("loginctl", "unlock-sessions")
        house.held()
        house.unlock()
    house.held("logout")
    assert "keys-locked why=logout forgotten=1" in house.log
    with login(house.alice):
        house.held()


def test_keys_are_locked_while_the_machine_sleeps(house: House, tmp_path: Path) -> None:
    """logind does all it does; but what it starts at last sends nobody to sleep: it keeps the log of that moment."""
    SLEEPING.parent.mkdir(parents=True, exist_ok=True)
    kept = tmp_path / "kept"
    SLEEPING.write_text(f"[Service]\nExecStart=\nExecStart=/bin/cp {house.log_file} {kept}\n")
    tell("systemctl", "daemon-reload")
    listed = tell("systemd-inhibit", "--list", "--no-pager", "--no-legend")
    waits = any("upcall" in line and "sleep" in line and "delay" in line for line in listed.splitlines())
    # Without polkit only root may have logind wait.
    assert waits or "note='logind does not wait before it sleeps" in house.log, house.log
    house.unlock()
    said = tell("busctl", "call", "org.freedesktop.login1", "/org/freedesktop/login1",
                "org.freedesktop.login1.Manager", "Suspend", "b", "false")  # fmt: skip
    if "not supported" in said:
        pytest.skip(f"this machine cannot sleep: {said}")
    wait_until(kept.exists, f"sleep: {said}", SLOW)
    if waits:
        assert "keys-locked why=suspend forgotten=1" in kept.read_text()
    wait_until(lambda: "keys-unlocked why=suspend" in house.log, "and is awake", SLOW)
    house.held()


def test_locking_goes_on_when_logind_starts_again(house: House) -> None:
    with login(house.alice) as session:
        tell("systemctl", "restart", "systemd-logind.service")
        wait_until(lambda: session in sessions(house.alice), "it knows the session still", SLOW)
        tell("loginctl", "lock-session", session)
        house.held("screen-lock")
        tell("loginctl", "unlock-session", session)
        house.held()
