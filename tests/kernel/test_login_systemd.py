"""Logins on a machine with systemd, the real one as process 1, after `upcall setup`: logind, a user's manager and
our units, the kernel's requests included."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import (
    NAMES,
    SLOW,
    Session,
    gone,
    name_key,
    prepare_names,
    prepare_sshd,
    private_folder,
    registered,
    require_setup,
    ssh,
    terminal,
    upcall_command,
)
from tests.kernel.scene import CONTENT
from upcall.install.wanted import SYSTEMD
from upcall.process import machine
from upcall.testing.lab.stage import Person, broker_pid, drop_caches, person, serving, wait_until

# An emulated processor is slow. Nobody is kept after the last logout.
DROP_INS = {
    "/etc/systemd/system/upcall-broker.service.d/lab.conf": "[Service]\nWatchdogSec=60\nTimeoutStartSec=120\n",
    "/etc/systemd/system/upcall-quota.service.d/lab.conf": "[Service]\nWatchdogSec=60\nTimeoutStartSec=120\n",
    "/etc/systemd/system/upcall-system-daemon.service.d/lab.conf": "[Service]\nWatchdogSec=60\n",
    "/etc/systemd/user/upcall-daemon.service.d/lab.conf": "[Service]\nWatchdogSec=60\n",
    "/etc/systemd/logind.conf.d/lab.conf": "[Login]\nUserStopDelaySec=0\nKillUserProcesses=yes\n",
}
SERVICES = ("upcall-broker.service", "upcall-system-daemon.service")


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=SLOW)
    return done.stdout.strip() + done.stderr.strip()


def cgroup(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip()


@pytest.fixture(scope="module")
def private() -> Iterator[Path]:
    """The machine as it is after `upcall setup`; alice's private folder."""
    if Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("systemd is not process 1")
    require_setup()
    for path, text in DROP_INS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    prepare_sshd()
    prepare_names("bob")
    said = systemctl("start", "systemd-journald.service", "dbus.service", "systemd-logind.service", "ssh.service")
    assert not said, said
    upcall_command("setup", "--request-key", "dns_resolver")
    try:
        with private_folder(person("alice")) as folder:
            yield folder
    finally:
        with Path("/results/journal").open("wb") as kept:
            subprocess.run(["journalctl", "--no-pager"], stdout=kept, check=False, timeout=SLOW)


def test_the_services_run(private: Path) -> None:
    wait_until(lambda: systemctl("is-active", *SERVICES).split() == ["active", "active"], "the services", SLOW)
    pid = registered(pwd.getpwnam(machine.USER).pw_uid)
    assert pid == int(systemctl("show", "--value", "--property=MainPID", "upcall-system-daemon.service"))


@pytest.fixture(scope="module")
def alice() -> Person:
    return person("alice")


@pytest.fixture(scope="module")
def inside(private: Path, alice: Person) -> Iterator[Session]:
    """Alice is logged in, until a test has her leave."""
    with ssh(alice) as session:
        yield session


@pytest.fixture
def file(private: Path) -> Path:
    return private / "file"


def test_a_login_starts_the_daemon_and_mounts(inside: Session, alice: Person, file: Path) -> None:
    assert f"/user@{alice.uid}.service/app.slice/upcall-daemon.service" in cgroup(registered(alice.uid))
    assert "/session-" in inside.say("cat /proc/self/cgroup")
    assert file.parent.is_mount()
    assert inside.say(f"cat > {file} <<.\n{CONTENT.decode()}.") == ""


def test_a_second_login_shares_daemon_and_mount(inside: Session, alice: Person, file: Path) -> None:
    daemon = registered(alice.uid)
    with terminal(alice) as other:
        assert serving(alice.uid) == daemon
        assert other.say(f"cat {file}") == CONTENT.decode().strip()
    assert serving(alice.uid) == daemon
    assert file.parent.is_mount()


def test_a_daemon_that_is_killed_comes_again(inside: Session, alice: Person, file: Path) -> None:
    killed = registered(alice.uid)
    os.kill(killed, signal.SIGKILL)
    registered(alice.uid, other_than=[killed])
    drop_caches()
    assert inside.say(f"cat {file}") == CONTENT.decode().strip()


def test_a_broker_that_is_killed_comes_again(inside: Session, alice: Person, file: Path) -> None:
    killed = broker_pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: broker_pid() not in (None, killed), "another broker", SLOW)
    registered(alice.uid)
    drop_caches()
    assert inside.say(f"cat {file}") == CONTENT.decode().strip()


def test_files_are_read_in_a_session_from_which_the_user_keyring_is_not_reached(inside: Session, file: Path) -> None:
    assert inside.say("keyctl session - keyctl list @s 2>/dev/null").endswith("keyring is empty")
    drop_caches()
    assert inside.say(f"keyctl session - cat {file} 2>/dev/null") == CONTENT.decode().strip()


def test_the_last_logout_ends_daemon_mount_and_manager(inside: Session, alice: Person, file: Path) -> None:
    inside.leave()
    gone(alice.uid)
    wait_until(lambda: not file.parent.is_mount(), "the folder as it is without alice", SLOW)
    assert CONTENT not in file.read_bytes()
    wait_until(lambda: systemctl("is-active", f"user@{alice.uid}.service") == "inactive", "alice's manager", SLOW)


def test_a_file_is_read_after_the_next_login(private: Path, alice: Person, file: Path) -> None:
    drop_caches()
    with ssh(alice) as session:
        registered(alice.uid)
        assert session.say(f"cat {file}") == CONTENT.decode().strip()
    gone(alice.uid)


def test_a_daemon_is_started_for_a_request_of_the_kernel(private: Path) -> None:
    bob = person("bob")
    assert serving(bob.uid) is None
    # A manager and a daemon within the six seconds of these requests: an emulated processor may need the next one.
    names = iter(NAMES)
    wait_until(lambda: name_key(next(names)), "an answer", SLOW)
    assert f"/user@{bob.uid}.service/" in cgroup(registered(bob.uid))


def test_undoing_setup_leaves_nothing(private: Path) -> None:
    upcall_command("setup", "--undo")
    assert broker_pid() is None
    assert not [path for path in SYSTEMD.files if Path(path).exists()]
    assert systemctl("is-active", *SERVICES).split() == ["inactive", "inactive"]
