"""Daemons that open files on their own user's eCryptfs mount: refused well before the kernel gives up, and named."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upcall_rsa import module as openssl
from upcall_rsa.blob import Blob, pack_blob

from tests.kernel.hostile import COLD, HostileModule, Verb, read_in_c
from tests.kernel.scene import (
    CONTENT,
    PASSPHRASE,
    House,
    attempt,
    begin,
    creating,
    enrol,
    key_service,
    keys,
    nothing_given_up,
    opening,
    outcome_counts,
    results,
    vault,
)
from upcall.daemon.isolation.module import IsolatedModule
from upcall.daemon.passphrase_sources import fetch
from upcall.kernel import keyring
from upcall.keymodule import KeyHandle, Secrets
from upcall.process.log import EventLog
from upcall.protocols.ecryptfs import own_files as ownfiles
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.testing.lab.stage import Person, do_as, end, start_broker, start_daemon, wait_until

PROJECT = Path(__file__).parents[2]
KEY, OTHER = keys()["rsa2048"], keys()["captured"]


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    house = House()
    try:
        house.open()
        yield house
    finally:
        house.close()


# --- what Python opens, as people start a daemon -------------------------------------------------------------


def _key_file_at(path: Path) -> None:
    """Tells alice's auth token, by which it is she who does this, that the key is in this file."""
    if not path.exists():
        path.touch(0o600)
        path.write_text(KEY.pem)
    blob = pack_blob(Blob(str(path), None, PASSPHRASE))
    keyring.add_user_key(KEY.signature, pack_auth_tok(AuthTok(KEY.signature, "openssl", blob)))


def test_a_key_file_on_the_mount_that_needs_it_is_refused_at_once(alice: Person, tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        broker = start_broker(log.fileno())
        daemon = start_daemon(alice, log.fileno())
        try:
            with vault(alice, KEY.signature) as files:
                paths = files.fill(2)
                there = files.upper / "key.pem"
                do_as(alice, lambda: _key_file_at(there))
                end(daemon)  # it has the key open still
                files.remount()
                daemon = start_daemon(alice, log.fileno())
                for work in (opening(paths[0]), creating(files.upper / "new")):
                    with nothing_given_up():
                        assert attempt(alice, work).errno == errno.EIO
                said = (tmp_path / "log").read_text()
                assert f"own-file-refused file={there} key={KEY.signature}" in said
                assert f"{ownfiles.WHY}: move it elsewhere" in said
                assert "deadlock-refused" not in said  # nothing was asked
                do_as(alice, lambda: _key_file_at(alice.home / "rsa2048.pem"))
                assert [attempt(alice, opening(path)).value for path in paths] == [CONTENT] * 2
        finally:
            end(daemon)
            end(broker)


def _hooked(module: HostileModule) -> Callable[[], KeyHandler]:
    """A daemon with this module, whose process opens no such file."""

    def handler() -> KeyHandler:
        ownfiles.refuse(keyring, EventLog("upcall-daemon"))
        return key_service(lambda: module)

    return handler


class OpeningModule(HostileModule):
    """Reads a file before it opens a key."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        self._path.read_bytes()
        return super().open(signature, blob, secrets)


def _reading(read: Callable[[], object]) -> Verb:
    def unwrap(handle: KeyHandle, wrapped: bytes) -> object:
        read()
        return handle.unwrap(wrapped)

    return unwrap


@pytest.mark.parametrize("verb", ["open", "unwrap"])
def test_a_module_that_reads_a_file_of_its_own_key_is_refused_at_once(shared: House, alice: Person, verb: str) -> None:
    shared.daemon(alice)
    with vault(alice, KEY.signature) as files:
        wanted, its = files.cold(2)
        opens = OpeningModule(its) if verb == "open" else HostileModule(unwrap=_reading(opening(its)))
        shared.daemon(alice, _hooked(opens))
        with nothing_given_up():
            assert attempt(alice, opening(wanted)).errno == errno.EIO
        assert f"own-file-refused file={its}" in shared.log("alice")
        shared.daemon(alice)
        assert attempt(alice, opening(wanted)).value == attempt(alice, opening(its)).value == CONTENT


def test_an_isolated_module_whose_key_file_needs_itself_is_refused_at_once(shared: House, alice: Person) -> None:
    """Its process opens none, either; what its C libraries open would be seen by nobody."""
    shared.daemon(alice)
    with vault(alice, KEY.signature) as files:
        (wanted,) = files.fill(1)
        there = files.upper / "key.pem"
        do_as(alice, lambda: _key_file_at(there))
        files.remount()
        try:
            apart = {"openssl": lambda: IsolatedModule("openssl", "upcall_rsa:module", lambda: time.monotonic() + 20)}
            shared.daemon(alice, lambda: KeyHandler(keyring, apart, fetch))
            _refused_once_the_child_is_there(alice, wanted, lambda: f"{there}: {ownfiles.WHY}" in shared.log("alice"))
        finally:
            do_as(alice, lambda: _key_file_at(alice.home / "rsa2048.pem"))
        shared.daemon(alice)
        assert attempt(alice, opening(wanted)).value == CONTENT


# --- what a C library or a child opens -----------------------------------------------------------------------


class OneOfTwo(HostileModule):
    """Hostile with one key only."""

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        if signature == KEY.signature:
            return super().open(signature, blob, secrets)
        return openssl.open(signature, blob, secrets)


def _by_a_library(path: Path) -> Callable[[], object]:
    return lambda: read_in_c(path)


def _by_a_child(path: Path) -> Callable[[], object]:
    return lambda: subprocess.run(["/bin/cat", str(path)], check=True, capture_output=True, timeout=20)


def _by_a_grandchild(path: Path) -> Callable[[], object]:
    return lambda: subprocess.run(["/bin/sh", "-c", f"cat {path}; true"], check=False, timeout=20)


@pytest.mark.parametrize("read", [_by_a_library, _by_a_child, _by_a_grandchild])
def test_a_file_that_a_library_or_child_opens_is_refused_and_other_keys_work(
    shared: House, alice: Person, read: Callable[[Path], Callable[[], object]]
) -> None:
    """And with another key of the same user everybody's files can be opened and made meanwhile."""
    enrol(alice, OTHER)
    shared.daemon(alice)
    with vault(alice, KEY.signature) as files, vault(alice, OTHER.signature) as innocent:
        wanted, its = files.cold(2)
        others = innocent.cold(6)
        before = outcome_counts().get("own-request", 0)
        shared.daemon(alice, lambda: key_service(lambda: OneOfTwo(unwrap=_reading(read(its)))))
        with nothing_given_up():
            refused = begin(alice, opening(wanted))
            tasks = [begin(alice, opening(path)) for path in others]
            tasks += [begin(alice, creating(innocent.upper / f"new-{number}")) for number in range(3)]
            assert [outcome.errno for outcome in results(tasks)] == [0] * len(tasks)
            assert refused.result().errno == errno.EIO
        # What the people asked for, and what was asked for on the way; and then nothing more.
        wait_until(lambda: outcome_counts()["own-request"] - before >= 2, "the daemon's own request")
        said = [line for line in shared.log("alice").splitlines() if "deadlock-refused" in line]
        assert any(("thread worker-" if read is _by_a_library else "(cat)") in line for line in said)
        shared.daemon(alice)
        assert outcome_counts()["own-request"] - before <= 5
        assert attempt(alice, opening(wanted)).value == attempt(alice, opening(its)).value == CONTENT


def test_a_file_that_a_library_of_an_isolated_module_opens_is_refused(
    shared: House, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lets nobody look at it: it looks itself."""
    named = alice.home / "named"  # which is not there at first
    shared.daemon(alice)
    with vault(alice, KEY.signature) as files:
        wanted, its = files.cold(2)
        monkeypatch.setenv(COLD, str(named))
        monkeypatch.setenv("PYTHONPATH", str(PROJECT))
        spec = "tests.kernel.hostile:reads_in_c"
        apart = {"openssl": lambda: IsolatedModule("openssl", spec, lambda: time.monotonic() + 20, EventLog("module"))}
        shared.daemon(alice, lambda: KeyHandler(keyring, apart, fetch))
        # To start it can take an emulated processor longer than the kernel waits: until then it opens nothing.
        wait_until(lambda: attempt(alice, opening(wanted)).errno == 0, "the key module's process")
        files.remount()
        named.symlink_to(its)
        with nothing_given_up():
            assert attempt(alice, opening(wanted)).errno == errno.EIO
        assert "deadlock-refused module=openssl" in shared.log("alice")
        shared.daemon(alice)
        assert attempt(alice, opening(wanted)).value == attempt(alice, opening(its)).value == CONTENT


def _refused_once_the_child_is_there(who: Person, path: Path, logged: Callable[[], bool]) -> None:
    """Starting it can take an emulated processor longer than the kernel waits. No try may be anything but refused."""

    def refused() -> bool:
        before = outcome_counts().get("timed-out", 0)
        assert attempt(who, opening(path)).errno == errno.EIO
        return outcome_counts().get("timed-out", 0) == before and logged()

    wait_until(refused, "a refusal that is none by the clock, and why in the log")


def test_a_module_may_read_a_file_of_another_key(shared: House, alice: Person) -> None:
    """Another key's: while one worker waits for it, another one answers, and nobody has to be refused."""
    enrol(alice, OTHER)
    shared.daemon(alice)
    with vault(alice, KEY.signature) as files, vault(alice, OTHER.signature) as innocent:
        (wanted,), (its,) = files.cold(1), innocent.cold(1)
        shared.daemon(alice, lambda: key_service(lambda: OneOfTwo(unwrap=_reading(opening(its)))))
        assert attempt(alice, opening(wanted)).value == CONTENT
