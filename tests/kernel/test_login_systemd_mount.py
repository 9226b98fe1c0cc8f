"""Mounts that follow logins, on a machine with systemd after `upcall setup`: our sandboxed unit, logind's events."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import (
    CONFIG,
    SLOW,
    SSH,
    Session,
    prepare_sshd,
    require_setup,
    ssh,
    terminal,
    upcall_command,
)
from tests.kernel.mount_scene import made, points, take_all_away
from tests.kernel.test_login_systemd import DROP_INS, systemctl
from upcall.testing.lab.stage import Person, drop_caches, person, wait_until

UNIT = "upcall-mount.service"
UPCALL = Path(sys.executable).with_name("upcall")
# A user's manager stays for a while after the last logout, as by default.
# What is not needed is not started: emulated processors are slow.
LEFT_OUT = "[Unit]\nConditionPathExists=/nowhere\n"
MORE = {
    "/etc/systemd/system/upcall-quota.service.d/lab.conf": LEFT_OUT,
    "/etc/systemd/system/upcall-system-daemon.service.d/lab.conf": LEFT_OUT,
    "/etc/systemd/system/upcall-mount.service.d/lab.conf": "[Service]\nWatchdogSec=60\nTimeoutStartSec=120\n",
    "/etc/systemd/logind.conf.d/lab.conf": "[Login]\nUserStopDelaySec=60\nKillUserProcesses=yes\n",
}


@pytest.fixture(scope="module")
def alice() -> Person:
    found = person("alice")
    passphrase = found.home / "passphrase"
    passphrase.touch(0o600)
    passphrase.write_text("labpass\n")
    os.chown(passphrase, found.uid, found.gid)
    return found


@pytest.fixture(scope="module", autouse=True)
def _machine(alice: Person) -> Iterator[None]:
    """The machine as it is after `upcall setup`, with mounting allowed."""
    if Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("systemd is not process 1")
    require_setup()
    for path, text in (DROP_INS | MORE).items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    if not SSH.exists():
        prepare_sshd()
    before = CONFIG.read_text() if CONFIG.exists() else ""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(f'{before}\n[mount]\nusers = ["alice"]\n')
    try:
        said = systemctl("start", "systemd-journald.service", "dbus.service", "systemd-logind.service", "ssh.service")
        assert not said, said
        systemctl("restart", "systemd-logind.service")
        systemctl("daemon-reload")
        # On a busy machine an emulated processor restarts all services more slowly than `upcall setup` waits for;
        # systemd goes on with it.
        with contextlib.suppress(AssertionError):
            upcall_command("setup", "--request-key", "none")
        wait_until(is_active, "the source", SLOW)
        yield
    finally:
        take_all_away()
        CONFIG.write_text(before)
        with Path("/results/journal-mount").open("wb") as kept:
            subprocess.run(["journalctl", "--no-pager"], stdout=kept, check=False, timeout=SLOW)
        for path in MORE:  # the next file needs these services
            Path(path).unlink()
        systemctl("daemon-reload")


def is_active() -> bool:
    return systemctl("is-active", UNIT) == "active"


@pytest.fixture
def inside(alice: Person) -> Iterator[Session]:
    with ssh(alice) as session:
        yield session


def test_the_unit_mounts_for_a_user_who_is_logged_in(inside: Session, alice: Person) -> None:
    wait_until(is_active, "the source", SLOW)
    said = inside.say(f"{UPCALL} key generate folder --module x25519 --passphrase-file passphrase --auto")
    assert "ended with" not in said, said
    said = inside.say(f"{UPCALL} mount private .private private --key folder --create --auto --on-logout")
    assert said == f"private: mounted on {alice.home}/private", said
    (mount,) = made()
    assert (mount.source, mount.point) == (f"upcall:{alice.uid}:private", f"{alice.home}/private")
    wait_until(lambda: inside.say("echo secret > private/file") == "", "the daemon answers", SLOW)
    drop_caches()
    assert inside.say("cat private/file") == "secret"


def test_the_last_logout_takes_it_away_and_the_next_login_mounts_it(alice: Person) -> None:
    wait_until(lambda: points() == [], "the logout takes it away", SLOW)
    with ssh(alice) as session:
        wait_until(lambda: points() == [f"{alice.home}/private"], "the login mounts it", SLOW)
        wait_until(lambda: session.say("cat private/file") == "secret", "the daemon answers", SLOW)
    wait_until(lambda: points() == [], "the logout takes it away", SLOW)


def test_a_source_that_is_killed_comes_again_and_knows_its_mounts(inside: Session, alice: Person) -> None:
    wait_until(lambda: points() == [f"{alice.home}/private"], "the login mounts it", SLOW)
    before = systemctl("show", "--value", "--property=MainPID", UNIT)
    systemctl("kill", "--signal=KILL", UNIT)
    wait_until(
        lambda: is_active() and systemctl("show", "--value", "--property=MainPID", UNIT) != before, "another", SLOW
    )
    said = inside.say(f"{UPCALL} umount private")
    assert said == f"private: unmounted from {alice.home}/private", said
    assert made() == []


def test_without_users_the_unit_does_not_run(inside: Session) -> None:
    text = CONFIG.read_text()
    CONFIG.write_text(text.replace('users = ["alice"]', "users = []"))
    try:
        systemctl("restart", UNIT)
        assert systemctl("is-active", UNIT) == "inactive"
        assert systemctl("is-failed", UNIT) == "inactive"
        said = inside.say(f"{UPCALL} mount private")
        assert "an administrator allows it by" in said and said.endswith(f"ended with {os.EX_UNAVAILABLE}"), said
    finally:
        CONFIG.write_text(text)
        systemctl("restart", UNIT)
    wait_until(is_active, "the source", SLOW)


# --- the quick start -----------------------------------------------------------------------------------------------

HERE = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEX = re.compile(r"\b[0-9a-f]{16}\b")  # a signature, another one for each key
PASSPHRASE = rb"(New passphrase for the key \w+|The same once more|Passphrase for the key \w+): $"


def quick_start(document: str) -> tuple[list[str], list[str]]:
    """The commands of root and of the user in a document's blocks about mounts, and what the user's print; but for
    mounts whose keys need a package of their own, which is not here."""
    text = (HERE / document).read_text()
    blocks = [block for block in BLOCK.findall(text) if "upcall mount " in block or "[mount]" in block]
    blocks = [block for block in blocks if "apt install" not in block]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith("# ")], [line for line in lines if line[:2] != "# "]


@pytest.mark.parametrize("document", ["README.md", "docs/mount.md"])
def test_the_quick_start_works_as_it_stands(document: str, alice: Person) -> None:
    """On a terminal, with the passphrase typed where it is asked for; and again after another login."""
    roots, users = quick_start(document)
    if not users:
        pytest.skip(f"{document} has no quick start of mounts")
    for name in (".private", "private", ".local", ".config"):
        shutil.rmtree(alice.home / name, ignore_errors=True)
    before = CONFIG.read_text()
    CONFIG.write_text(before.replace('\n[mount]\nusers = ["alice"]\n', "\n"))
    path = f"{UPCALL.parent}:{os.environ['PATH']}"
    try:
        for line in roots:
            done = subprocess.run(["sh", "-c", line], env={**os.environ, "PATH": path}, timeout=SLOW, check=False)
            assert done.returncode == 0, line
        wait_until(is_active, "the source", SLOW)
        with terminal(alice) as session:
            session.say(f"PATH={path}; export PATH")
            wait_until(
                lambda: "registered" in session.say("systemctl --user status upcall-daemon"), "her daemon", SLOW
            )
            said = [answered(session, line[2:]) for line in users if line.startswith("$ ")]
        expected = [HEX.sub("-", line) for line in users if not line.startswith("$ ") and line != "..."]
        assert all(any(line in HEX.sub("-", one) for one in said) for line in expected), said
        assert not any("ended with" in one for one in said), said
        assert points() == []
        with terminal(alice) as session:
            session.say(f"PATH={path}; export PATH")
            said = [answered(session, "upcall mount private")]
            wait_until(lambda: session.say("cat private/letter") == "secret", f"it is read again: {said}", SLOW)
            assert "ended with" not in answered(session, "upcall umount private")
    finally:
        CONFIG.write_text(before)


def answered(session: Session, command: str) -> str:
    """What a command prints on a terminal where somebody types the passphrase."""
    return session.say(command, answers={PASSPHRASE: b"correct horse\n"})
