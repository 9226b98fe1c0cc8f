"""Kerberised CIFS mounts: whoever answers the kernel, the peer or we, people's files are theirs, and stay at hand."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.cifs_scene import (
    mount_for,
    mount_of,
    mountpoint,
    ours,
    owner,
    session_numbers,
    sessions,
    shared_mount,
    spnego,
    try_again,
    writing,
)
from tests.kernel.scene import House, attempt
from upcall.testing.lab.fileserver import PEER, SHARE, FileServer, mount_cifs, request_key_lines
from upcall.testing.lab.kerberos import FILE_SERVER, Realm
from upcall.testing.lab.stage import Person, unmount, wait_until


@pytest.fixture(scope="module", params=["peer", "ours"], autouse=True)
def answering(request: pytest.FixtureRequest, share: FileServer, alice: Person, bob: Person) -> Iterator[None]:
    """Who answers the kernel: cifs.upcall, or we."""
    if request.param == "peer":
        with request_key_lines(PEER):
            yield
        return
    house = House()
    try:
        house.open()
        for who in (alice, bob):
            house.daemon(who, spnego)
        with ours():
            yield
    finally:
        house.close()


@pytest.fixture(autouse=True)
def tickets(kerberos: Realm, alice: Person, bob: Person) -> Iterator[None]:
    """Alice and bob have a ticket each when a test begins."""
    for who in (alice, bob):
        kerberos.login(who)
    yield
    for who in (alice, bob):
        kerberos.logout(who)


def test_a_mount_acts_in_one_persons_name(share: FileServer, alice: Person) -> None:
    with mount_for(alice) as folder:
        assert attempt(alice, writing(folder, alice)).value == "by alice\n"
        assert owner(share, alice) == alice.uid
        assert sessions() == {alice.uid: "encrypted"}


def test_the_mount_helper_gets_a_ticket(share: FileServer, alice: Person) -> None:
    folder = mountpoint()
    folder.mkdir(parents=True)
    options = f"sec=krb5,{','.join(mount_of(alice))},uid={alice.uid}"
    done = subprocess.run(
        ["mount.cifs", f"//{FILE_SERVER}/{SHARE}", folder, "-o", options], capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        assert attempt(alice, writing(folder, alice)).value == "by alice\n"
    finally:
        unmount(folder)


def test_on_a_shared_mount_each_acts_in_their_own_name(share: FileServer, alice: Person, bob: Person) -> None:
    """On one mount. What is alice's is closed to bob by the server, not by the kernel here."""
    with shared_mount(alice) as folder:
        for who in (alice, bob):
            assert attempt(who, writing(folder, who)).value == f"by {who.name}\n"
            assert owner(share, who) == who.uid
        assert attempt(bob, (folder / "alice" / "file").read_text).errno == errno.EACCES
        assert sessions() == {who.uid: "encrypted" for who in (alice, bob)}


def test_without_a_ticket_only_that_person_has_to_wait(
    kerberos: Realm, share: FileServer, alice: Person, bob: Person
) -> None:
    kerberos.logout(bob)
    with shared_mount(alice) as folder:
        assert attempt(alice, writing(folder, alice)).errno == 0
        assert attempt(bob, writing(folder, bob)).errno == errno.EACCES
        assert attempt(alice, writing(folder, alice)).errno == 0
        kerberos.login(bob)
        assert try_again(bob, writing(folder, bob)).errno == 0


def test_a_mount_without_a_ticket_is_refused(kerberos: Realm, share: FileServer, alice: Person) -> None:
    kerberos.logout(alice)
    assert mount_cifs(mountpoint(), *mount_of(alice)) == errno.ENOKEY


def test_connections_that_break_are_made_anew(share: FileServer, alice: Person, bob: Person) -> None:
    """In each person's own name."""
    with shared_mount(alice) as folder:
        for who in (alice, bob):
            assert attempt(who, writing(folder, who)).errno == 0
        share.drop_connections()
        _everybody_writes(folder, share, alice, bob)


def test_the_kernel_makes_connections_anew_by_itself(share: FileServer, alice: Person, bob: Person) -> None:
    """Nobody uses the mount: one of the kernel's own threads asks for everybody's tickets."""
    with shared_mount(alice) as folder:
        for who in (alice, bob):
            assert attempt(who, writing(folder, who)).errno == 0
        before = session_numbers()
        share.drop_connections()
        wait_until(lambda: len(session_numbers() - before) == 2, "two new sessions")
        assert sessions() == {who.uid: "encrypted" for who in (alice, bob)}


def test_sessions_are_made_anew_when_the_server_starts_again(share: FileServer, alice: Person, bob: Person) -> None:
    with shared_mount(alice) as folder:
        for who in (alice, bob):
            assert attempt(who, writing(folder, who)).errno == 0
        share.restart()
        _everybody_writes(folder, share, alice, bob)


def _everybody_writes(folder: Path, share: FileServer, *people: Person) -> None:
    for number, who in enumerate(people):
        name = f"again-{number}"
        # The kernel looks every 3 s whether the server is back; until then it says EHOSTDOWN.
        wait_until(lambda: attempt(who, writing(folder, who, name)).errno == 0, f"{who.name} to write")  # noqa: B023
        assert owner(share, who, name) == who.uid
