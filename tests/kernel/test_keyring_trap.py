"""Files on eCryptfs, and sessions whose keyring leads nowhere or is revoked: the user manager's, one that is over."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upcall_rsa.blob import Blob, pack_blob

from tests.kernel.scene import CONTENT, House, Vault, keys, strike_out
from upcall.daemon import __main__ as daemon_main
from upcall.daemon.plugins import Module, Plugins
from upcall.kernel import keyring
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.auto_add import add_auto_keys
from upcall.testing.lab import stage
from upcall.testing.lab.stage import Person, Task, do_as, drop_caches, person, serving, wait_until
from upcall.testing.processes import ONLY_AGENT

KEY = keys()["rsa3072"]


def bare() -> None:
    """As systemd starts a user's manager: a session keyring, and nothing in it."""
    keyring._call("join", 1, 0)


def revoked() -> None:
    """As pam_keyinit leaves it at a logout."""
    keyring.revoke(keyring.join_session_and_link_user_keyring())


SESSIONS: dict[str, Callable[[], None]] = {"bare": bare, "revoked": revoked}


@pytest.fixture
def carol() -> Iterator[Person]:
    """Alice, with one key, marked auto, whose auth token is not in her user keyring; its passphrase is in a file."""
    alice = person("alice")
    folder = alice.home / "trap"
    strike_out(alice, KEY)

    def enrol() -> None:
        folder.mkdir(0o700)
        pem, word = folder / "key.pem", folder / "word"
        for path, text in ((pem, KEY.pem), (word, "labpass\n")):
            path.touch(0o600)
            path.write_text(text)
        blob = pack_blob(Blob(str(pem), f"file:{word}", b""))
        when = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        store = KeyStore(folder / "upcall/keys")
        store.save(Entry("trap", "openssl", KEY.signature, f"file:{word}", "RSA", when, str(pem), blob, auto=True))

    do_as(alice, enrol)
    yield alice
    strike_out(alice, KEY)
    shutil.rmtree(folder)


def login(who: Person, house: House, begin: Callable[[], None], gate: Path | None = None) -> Task[int]:
    """A session whose keyring is as `begin` leaves it; the daemon that it starts adds the keys that are marked auto.
    With `gate`, the session ends, and its keyring with it, once there is such a file; the daemon goes on."""

    def work() -> int:
        os.environ["XDG_DATA_HOME"] = str(who.home / "trap")
        begin()
        plugins = Plugins((Module("openssl", "upcall_rsa:module"),))
        settings = ONLY_AGENT._replace(plugins=plugins, keys=add_auto_keys())
        if gate is None:
            return daemon_main.serve_with(settings)
        pid = os.fork()
        if pid == 0:
            os._exit(daemon_main.serve_with(settings))
        try:
            wait_until(gate.exists, "the logout")
            keyring.revoke(keyring.SESSION_KEYRING)
            gate.with_name("over").touch()
            while True:
                signal.pause()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    task = Task(who, work, output=house.folder / "login.log")
    house.others.append(task)  # type: ignore[arg-type]
    wait_until(lambda: task.ended or serving(who.uid) is not None, "the daemon")
    return task


@pytest.mark.parametrize("session", SESSIONS)
def test_a_mount_at_login_finds_the_daemons_key(house: House, carol: Person, session: str) -> None:
    """Daemon and mount helper know nothing of each other but the user keyring."""
    login(carol, house, SESSIONS[session])
    vault = Vault(carol, KEY.signature)
    for folder in (vault.lower, vault.upper):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, carol.uid, carol.gid)
    options = f"ecryptfs_sig={KEY.signature},ecryptfs_cipher=aes,ecryptfs_key_bytes=16"

    def mount() -> None:
        SESSIONS[session]()
        keyring.ensure_user_keyring_linked()  # as mount.ecryptfs_private does
        stage._mount(str(vault.lower), str(vault.upper), options)

    do_as(carol, mount, keep_root=True)
    vault.is_mounted = True
    try:
        (path,) = vault.fill(1)
        drop_caches()
        assert do_as(carol, path.read_bytes) == CONTENT
    finally:
        vault.unmount()
    assert "key-added name=trap" in house.log("login")


def test_files_are_read_after_the_daemons_login_ended_and_its_keyring_was_revoked(house: House, carol: Person) -> None:
    gate = house.folder / "logout"
    house.folder.chmod(0o1777)

    def begin() -> None:
        keyring.join_session_and_link_user_keyring()

    login(carol, house, begin, gate)
    vault = Vault(carol, KEY.signature)
    vault.mount()
    try:
        (path,) = vault.cold(1)
        assert do_as(carol, path.read_bytes) == CONTENT
        do_as(carol, gate.touch)
        wait_until(gate.with_name("over").exists, "the end of the login")
        vault.remount()
        assert do_as(carol, path.read_bytes) == CONTENT
        (other,) = vault.cold(1)
        assert do_as(carol, other.read_bytes) == CONTENT
    finally:
        vault.unmount()
