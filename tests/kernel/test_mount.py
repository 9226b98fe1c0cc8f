"""A user's mounts on the real kernel, by the commands that users have."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.mount_scene import CONFIG, made, points, source, take_all_away, upcall
from tests.kernel.scene import CONTENT, House, answered, attempt, opening
from upcall.testing.lab.stage import Person, drop_caches, person, start_daemon

LOG = Path("/tmp/mount.log")


@pytest.fixture(scope="module")
def alice() -> Person:
    """With a passphrase in a file, and no key yet."""
    found = person("alice")
    passphrase = found.home / "passphrase"
    passphrase.touch(0o600)
    passphrase.write_text("labpass\n")
    os.chown(passphrase, found.uid, found.gid)
    return found


@pytest.fixture(scope="module")
def allowed() -> Iterator[None]:
    with source(LOG):
        yield
        take_all_away()


@pytest.fixture
def daemon(house: House, alice: Person, allowed: None) -> Iterator[subprocess.Popen[bytes]]:
    """Alice's, of the command."""
    process = start_daemon(alice)
    yield process
    process.kill()
    process.wait()


def test_without_the_service_the_error_says_what_root_can_do(alice: Person) -> None:
    done = upcall(alice, "key", "generate", "--bits", "2048", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    done = upcall(alice, "mount", "private", ".private", "private", "--create")
    assert done.returncode == os.EX_UNAVAILABLE
    assert '[mount] users = ["alice"]' in done.stderr and "systemctl restart upcall-mount" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_ordinary_user_mounts_writes_reads_locks_and_unmounts(
    daemon: subprocess.Popen[bytes], alice: Person
) -> None:
    upper, lower = alice.home / "private", alice.home / ".private"
    done = upcall(alice, "mount", "private", ".private", "private", "--create")
    assert (done.returncode, done.stdout) == (0, f"private: mounted on {upper}\n"), done.stderr
    (mount,) = made()
    assert (mount.point, mount.source) == (str(upper), f"upcall:{alice.uid}:private")
    assert {"nosuid", "nodev"} <= mount.options

    assert answered(alice, lambda: (upper / "file").write_bytes(CONTENT)).errno == 0
    drop_caches()
    assert answered(alice, opening(upper / "file")).value == CONTENT
    assert CONTENT not in (lower / "file").read_bytes()

    (row,) = json.loads(upcall(alice, "mounts", "--json").stdout)
    assert (row["name"], row["mounted"], row["lower"], row["keys"]) == (
        "private",
        str(upper),
        str(lower),
        ["default"],
    )

    done = upcall(alice, "lock")
    assert done.returncode == 0, done.stderr
    drop_caches()
    assert attempt(alice, opening(upper / "file")).errno != 0
    done = upcall(alice, "unlock")
    assert done.returncode == 0, done.stderr
    assert answered(alice, opening(upper / "file")).value == CONTENT

    user = subprocess.Popen(["sleep", "1000"], cwd=upper, user=alice.uid, group=alice.gid, extra_groups=[])
    try:
        done = upcall(alice, "umount", "private")
        assert done.returncode == os.EX_TEMPFAIL, done.stderr
        assert "is in use" in done.stderr and f"in use by sleep (pid {user.pid}): works there" in done.stderr
        assert points() == [str(upper)]
        done = upcall(alice, "umount", "--lazy", "private")
        assert (done.returncode, done.stdout) == (0, f"private: unmounted from {upper}\n"), done.stderr
    finally:
        user.kill()
        user.wait()
    assert made() == [] and os.listdir(upper) == []

    done = upcall(alice, "mount", "private")  # it is remembered
    assert done.returncode == 0, done.stderr
    assert answered(alice, opening(upper / "file")).value == CONTENT
    done = upcall(alice, "umount", "private")
    assert (done.returncode, made()) == (0, []), done.stderr
    assert upcall(alice, "umount", "private").stdout == "private: is not mounted\n"


def test_a_user_who_is_not_allowed_is_told_what_the_administrator_can_do(allowed: None, alice: Person) -> None:
    before = CONFIG.read_text()
    CONFIG.write_text('[mount]\nusers = ["bob", "@nobody-is-in-it"]\n')
    try:
        done = upcall(alice, "mount", "private")
    finally:
        CONFIG.write_text(before)
    assert done.returncode == os.EX_NOPERM
    assert done.stderr.startswith("upcall: alice may not mount: the administrator can allow it: ")
    assert made() == []


def test_a_user_is_allowed_as_a_member_of_a_group(daemon: subprocess.Popen[bytes], alice: Person) -> None:
    before = CONFIG.read_text()
    CONFIG.write_text('[mount]\nusers = ["@alice"]\n')
    try:
        done = upcall(alice, "mount", "private")
        assert done.returncode == 0, done.stderr
        assert upcall(alice, "umount", "--all").returncode == 0
    finally:
        CONFIG.write_text(before)
    assert made() == []
