"""Files on the real kernel, with broker and daemons as people start them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.scene import (
    CONTENT,
    PASSPHRASE,
    attempt,
    begin,
    creating,
    enrol,
    keys,
    nothing_given_up,
    opening,
    results,
    strike_out,
    vault,
)
from upcall.process.control import DaemonControl
from upcall.testing.lab.stage import Person, broker_status, do_as, end, start_broker, start_daemons, wait_until

CAPTURED, OTHER = keys()["captured"], keys()["rsa2048"]
HEADER = 8192  # bytes before the first page of a lower file


@pytest.fixture(scope="module", autouse=True)
def _people(root: Person, alice: Person, bob: Person) -> Iterator[None]:
    running = [start_broker()]
    try:
        running += start_daemons(root, alice, bob)
        yield
    finally:
        for process in reversed(running):
            end(process)


def test_a_daemon_that_is_registered_has_its_keys_open(alice: Person) -> None:
    """Importing a key module and reading the key can take this machine longer than the kernel waits."""

    def is_open() -> bool:
        status = do_as(alice, lambda: DaemonControl().status())
        return {"signature": OTHER.signature, "module": "openssl", "open": True} in status["keys"]

    wait_until(is_open, "the key is open")  # a busy machine is waited for no longer than 4 s before it registers


def test_create_remount_and_read_by_three_uids_at_once(root: Person, alice: Person, bob: Person) -> None:
    count = 20

    def make(folder: Path, who: Person) -> None:
        for number in range(count):
            (folder / f"f{number}").write_text(f"{who.name}'s file {number}\n")

    def read(folder: Path) -> list[str]:
        return [(folder / f"f{number}").read_text() for number in range(count)]

    with (
        vault(root, CAPTURED.signature) as one,
        vault(alice, OTHER.signature) as two,
        vault(bob, CAPTURED.signature) as three,
    ):
        vaults = (one, two, three)
        made = results([begin(each.who, lambda each=each: make(each.upper, each.who)) for each in vaults])  # type: ignore[misc]
        assert [outcome.errno for outcome in made] == [0, 0, 0]
        for each in vaults:
            each.remount()
        tasks = [begin(each.who, lambda each=each: read(each.upper)) for each in vaults]  # type: ignore[misc]
        for each, outcome in zip(vaults, results(tasks), strict=True):
            assert outcome.value == [f"{each.who.name}'s file {number}\n" for number in range(count)]
            lower = (each.lower / "f0").read_bytes()
            assert bytes.fromhex(each.signatures[0]) in lower[:HEADER]
            assert b"file" not in lower


@pytest.mark.parametrize("name", ["rsa2048", "rsa3072", "rsa4096"])
def test_files_are_read_with_each_size_of_key(alice: Person, name: str) -> None:
    key = keys()[name]
    enrol(alice, key)
    with vault(alice, key.signature) as files:
        for path in files.cold(3):
            assert attempt(alice, opening(path)).value == CONTENT
        header = (files.lower / "file-0").read_bytes()[:HEADER]
        # 0x01, length, version 3, the signature, algorithm 1, and the wrapped key up to where zeros begin
        at = header.index(bytes.fromhex(key.signature)) + 9
        assert len(header[at:].rstrip(b"\0")) == key.bits // 8


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
def test_files_are_read_with_each_size_of_aes_key(bob: Person, key_bytes: int) -> None:
    with vault(bob, CAPTURED.signature, key_bytes=key_bytes) as files:
        for path in files.cold(3):
            assert attempt(bob, opening(path)).value == CONTENT


def test_eight_processes_of_one_person_at_once(alice: Person) -> None:
    def work(folder: Path, process: int) -> None:
        for number in range(10):
            (folder / f"p{process}-{number}").write_bytes(CONTENT)

    def read(folder: Path, process: int) -> None:
        for number in range(10):
            assert (folder / f"p{process}-{number}").read_bytes() == CONTENT

    with vault(alice, OTHER.signature) as files:
        for step in (work, read):
            tasks = [begin(alice, lambda i=i, step=step: step(files.upper, i)) for i in range(8)]  # type: ignore[misc]
            assert [outcome.errno for outcome in results(tasks, 60)] == [0] * 8
            files.remount()


def test_a_file_on_a_mount_with_two_keys_is_read(alice: Person) -> None:
    """Both are in the header, and each of them alone opens the file."""
    enrol(alice, CAPTURED)
    with vault(alice, OTHER.signature, CAPTURED.signature) as files:
        path = files.fill(1)[0]
        header = (files.lower / path.name).read_bytes()[:HEADER]
        assert bytes.fromhex(OTHER.signature) in header
        assert bytes.fromhex(CAPTURED.signature) in header
        for alone in (OTHER, CAPTURED):
            files.remount(alone.signature)
            assert attempt(alice, opening(path)).value == CONTENT


def test_a_file_is_read_although_one_of_two_keys_is_missing(alice: Person) -> None:
    """The kernel refuses to mount with a signature that is in no keyring; the file needs only one of its two."""
    enrol(alice, CAPTURED)
    with vault(alice, OTHER.signature, CAPTURED.signature) as files:
        path = files.fill(1)[0]
        strike_out(alice, CAPTURED)
        files.unmount()
        with pytest.raises(FileNotFoundError):
            files.mount()
        files.remount(OTHER.signature)
        assert attempt(alice, opening(path)).value == CONTENT


def test_unwrapping_fails_with_one_key_and_works_with_the_other(alice: Person) -> None:
    enrol(alice, CAPTURED)
    with vault(alice, CAPTURED.signature, OTHER.signature) as files:
        path = files.cold(1)[0]
        do_as(alice, lambda: DaemonControl().lock(CAPTURED.signature))
        try:
            assert attempt(alice, opening(path)).value == CONTENT
        finally:
            do_as(alice, lambda: DaemonControl().unlock(CAPTURED.signature, bytearray()))


def test_a_locked_key_refuses_until_it_is_unlocked(bob: Person) -> None:
    """A blob of ours says where the passphrase is: with the user, who gives it to the daemon."""
    key = keys()["rsa3072"]
    enrol(bob, key, "ask")

    def unlock() -> None:
        DaemonControl().unlock(key.signature, bytearray(PASSPHRASE))

    with vault(bob, key.signature) as files:
        assert attempt(bob, creating(files.upper / "too-early")).errno == errno.EIO
        do_as(bob, unlock)
        path = files.cold(1)[0]
        assert attempt(bob, opening(path)).value == CONTENT
        files.remount()
        do_as(bob, lambda: DaemonControl().lock(None))
        assert attempt(bob, opening(path)).errno == errno.EIO
        do_as(bob, unlock)
        assert attempt(bob, opening(path)).value == CONTENT
        do_as(bob, lambda: DaemonControl().unlock_all())


def test_a_key_that_is_taken_away_stops_working_at_once(bob: Person) -> None:
    key = keys()["rsa2048"]
    enrol(bob, key)
    with vault(bob, key.signature) as files:
        paths = files.cold(2)
        assert attempt(bob, opening(paths[0])).value == CONTENT
        strike_out(bob, key)
        with nothing_given_up():
            assert attempt(bob, opening(paths[1])).errno == errno.EIO
        enrol(bob, key)
        assert attempt(bob, opening(paths[1])).value == CONTENT


def test_the_daemon_of_whoever_opens_is_asked(root: Person, alice: Person) -> None:
    """Root may read alice's lower files, and has not got her key: root's daemon is asked, and refuses."""
    with vault(alice, OTHER.signature) as files:
        path = files.cold(1)[0]
        refused = attempt(root, opening(path))
        assert refused.errno == errno.EIO
        assert attempt(alice, opening(path)).value == CONTENT


def test_nothing_is_left_over() -> None:
    status = broker_status()
    assert status is not None
    daemons = status["daemons"]
    assert isinstance(daemons, list)
    assert len(daemons) == 3
    assert all(daemon["pending"] == [] for daemon in daemons)
    late = sum(counts.get("timed-out", 0) for counts in status["outcomes"].values())  # on a busy machine
    assert sum(daemon["rejected"] for daemon in daemons) <= late
    assert all(device["open"] for device in status["devices"])
    assert os.listdir("/run/upcall") != []
