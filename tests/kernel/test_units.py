"""Our units with a real systemd, on the real kernel: what they let through is enough for eCryptfs.

systemd is process 1 of a pid namespace in the guest, and starts our units and nothing else.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import require_setup
from tests.kernel.scene import CONTENT, attempt, keys, opening, vault
from upcall.install.wanted import SYSTEMD, content
from upcall.process import machine
from upcall.process.paths import SYSTEM_FOLDER
from upcall.testing.lab.stage import PATIENCE, Person, person, wait_until

INIT = Path("/lib/systemd/systemd")
FOLDER = Path("/etc/systemd/system")
SLOW = 5 * PATIENCE
# The rest of a Debian need not boot, and an emulated processor is slow.
ALONE = """[Unit]
DefaultDependencies=no
[Service]
WatchdogSec=60
TimeoutStartSec=120
StandardError=append:/var/log/units
"""
# A user's manager without logind and D-Bus.
MANAGER = """[Unit]
DefaultDependencies=no
[Service]
User={name}
Delegate=yes
Environment=XDG_RUNTIME_DIR=/run/user/{uid} HOME={home}
ExecStart={init} --user --unit=upcall-daemon.service --log-target=console
StandardError=append:/var/log/units
"""
TARGET = """[Unit]
DefaultDependencies=no
Wants=upcall-broker.service upcall-quota.service upcall-system-daemon.service manager.service
"""

SERVICES = ("upcall-quota.service", "upcall-system-daemon.service", "upcall-broker.service")

pytestmark = pytest.mark.skipif(not INIT.exists(), reason="systemd is not installed")


class Systemd:
    """Process 1 of a namespace, and commands inside it."""

    def __init__(self) -> None:
        words = ["unshare", "--fork", "--pid", "--mount", "--mount-proc", "--propagation", "private", "--kill-child"]
        words += [str(INIT), "--system", "--unit=try.target", "--log-target=console"]
        with Path("/var/log/systemd").open("wb") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "container": "lab"},
            )
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        wait_until(lambda: bool(children.read_text().split()), "process 1")
        self._inside = ["nsenter", "-t", children.read_text().split()[0], "--pid", "--mount"]

    def say(self, *command: str) -> str:
        """What a command says inside; whether it fails is said, too."""
        done = subprocess.run([*self._inside, *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() + done.stderr.strip()

    def is_active(self, *units: str) -> bool:
        return self.say("systemctl", "is-active", *units).split() == ["active"] * len(units)

    def end(self) -> None:
        self.say("systemctl", "stop", "manager.service", *SERVICES)
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def systemd() -> Iterator[Systemd]:
    require_setup()
    alice = person("alice")
    for path in SYSTEMD.files:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content(SYSTEMD, path, sys.executable))
        if place.suffix == ".service":
            (place.parent / f"{place.name}.d").mkdir(exist_ok=True)
            (place.parent / f"{place.name}.d" / "alone.conf").write_text(ALONE)
    values = {"name": alice.name, "uid": alice.uid, "home": alice.home, "init": INIT}
    (FOLDER / "manager.service").write_text(MANAGER.format(**values))
    (FOLDER / "try.target").write_text(TARGET)
    Path("/var/log/units").write_bytes(b"")
    Path("/var/log/units").chmod(0o666)
    subprocess.run(["systemd-sysusers", "upcall.conf"], check=True, timeout=SLOW)
    running = Systemd()
    try:
        yield running
    finally:
        running.end()
        shutil.rmtree(SYSTEM_FOLDER)


def status(systemd: Systemd) -> str:
    return systemd.say(sys.executable, "-I", "-m", "upcall", "status", "--json")


def test_all_units_start(systemd: Systemd) -> None:
    try:
        wait_until(lambda: systemd.is_active(*SERVICES), "the services", SLOW)
        wait_until(lambda: '"uid": 5001' in status(systemd), "the daemon of alice", SLOW)
    except TimeoutError:
        pytest.fail(Path("/var/log/units").read_text() + Path("/var/log/systemd").read_text())
    assert f'"uid": {pwd.getpwnam(machine.USER).pw_uid}' in status(systemd)


def test_the_users_daemon_unit_serves_a_users_file(systemd: Systemd, alice: Person) -> None:
    with vault(alice, keys()["rsa2048"].signature) as made:
        (path,) = made.cold(1)
        assert attempt(alice, opening(path)).value == CONTENT


def test_a_broker_that_is_killed_comes_again(systemd: Systemd, alice: Person) -> None:
    before = systemd.say("systemctl", "show", "--property=MainPID", "--value", "upcall-broker.service")
    systemd.say("systemctl", "kill", "--signal=KILL", "upcall-broker.service")

    def again() -> bool:
        now = systemd.say("systemctl", "show", "--property=MainPID", "--value", "upcall-broker.service")
        return now not in (before, "0") and '"uid": 5001' in status(systemd)

    wait_until(again, "another broker, and alice's daemon", SLOW)
