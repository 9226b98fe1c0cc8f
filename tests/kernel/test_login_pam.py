"""Logins on a machine without systemd, after `upcall setup`: PAM alone, with `login` on a terminal and sshd, and files
on a mount that is made at login. What needs no eCryptfs is in test_session.py, on a faster kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import (
    SLOW,
    Session,
    gone,
    prepare_sshd,
    private_folder,
    registered,
    require_setup,
    ssh,
    terminal,
    upcall_command,
)
from tests.kernel.scene import CONTENT
from upcall.install.sessions.records import FOLDER
from upcall.testing.lab.stage import Person, broker_status, drop_caches, person, serving, wait_until


@contextlib.contextmanager
def sshd(name: str, port: int) -> Iterator[None]:
    """sshd under any name, which is what PAM calls its sessions."""
    program = Path("/run/sshd") / name
    program.symlink_to("/usr/sbin/sshd")
    process = subprocess.Popen([program, "-D", "-e", "-p", str(port)])
    try:
        yield
    finally:
        process.terminate()
        process.wait(SLOW)


@pytest.fixture(scope="module")
def private() -> Iterator[Path]:
    """The machine as it is after `upcall setup`; alice's private folder."""
    require_setup()
    prepare_sshd()
    Path("/run/sshd").mkdir()
    upcall_command("setup", "--request-key", "none")
    try:
        wait_until(lambda: broker_status() is not None, "the broker", SLOW)
        with sshd("sshd", 22), sshd("cron", 23), private_folder(person("alice")) as folder:
            yield folder
    finally:
        upcall_command("setup", "--undo")


@pytest.fixture(scope="module")
def alice() -> Person:
    return person("alice")


@pytest.fixture(scope="module")
def inside(private: Path, alice: Person) -> Iterator[Session]:
    """Alice is logged in on a terminal, until a test has her leave."""
    with terminal(alice) as session:
        yield session


@pytest.fixture
def file(private: Path) -> Path:
    return private / "file"


def test_a_login_starts_the_daemon_and_mounts(inside: Session, alice: Person, file: Path) -> None:
    registered(alice.uid)
    assert file.parent.is_mount()
    assert inside.say(f"cat > {file} <<.\n{CONTENT.decode()}.") == ""


def test_a_second_login_shares_daemon_and_mount(inside: Session, alice: Person, file: Path) -> None:
    daemon = registered(alice.uid)
    with ssh(alice) as other:
        assert serving(alice.uid) == daemon
        assert other.say(f"cat {file}") == CONTENT.decode().strip()
    assert serving(alice.uid) == daemon
    assert file.parent.is_mount()


def test_files_are_read_in_a_session_from_which_the_user_keyring_is_not_reached(inside: Session, file: Path) -> None:
    assert inside.say("keyctl session - keyctl list @s 2>/dev/null").endswith("keyring is empty")
    drop_caches()
    assert inside.say(f"keyctl session - cat {file} 2>/dev/null") == CONTENT.decode().strip()


def test_a_daemon_that_is_killed_comes_again_with_the_next_login(inside: Session, alice: Person, file: Path) -> None:
    killed = registered(alice.uid)
    os.kill(killed, signal.SIGKILL)
    gone(alice.uid)
    with ssh(alice):
        registered(alice.uid, other_than=[killed])
        drop_caches()
        assert inside.say(f"cat {file}") == CONTENT.decode().strip()


def test_the_last_logout_ends_daemon_and_mount(inside: Session, alice: Person, file: Path) -> None:
    inside.leave()
    gone(alice.uid)
    wait_until(lambda: not file.parent.is_mount(), "the folder as it is without alice", SLOW)
    assert CONTENT not in file.read_bytes()


def test_a_file_is_read_after_the_next_login(private: Path, alice: Person, file: Path) -> None:
    drop_caches()
    with ssh(alice) as session:
        registered(alice.uid)
        assert session.say(f"cat {file}") == CONTENT.decode().strip()
    gone(alice.uid)


def test_a_job_of_cron_is_no_login(private: Path) -> None:
    """The same program as a login's, and the same stack: but PAM is told that it is cron."""
    bob = person("bob")
    Path("/etc/pam.d/cron").write_text(Path("/etc/pam.d/sshd").read_text())
    with ssh(bob, port=23) as session:
        assert session.say("id -un") == "bob"
        assert not (FOLDER / str(bob.uid)).exists()
        assert serving(bob.uid) is None
