"""What can go wrong between a mount and its ticket: the caller has the right errno in time, and a remedy helps."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.cifs_scene import (
    SERVICE,
    Blocking,
    begin_mounting,
    counts,
    mount_for,
    mounting,
    ours,
    shared_mount,
    spnego,
    writing,
)
from tests.kernel.scene import House, Outcome, attempt, pending
from upcall import config
from upcall.broker import server
from upcall.core.errors import REASONS
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.process.settings import dumps
from upcall.protocols.catalogue import SERVICES
from upcall.testing.lab.fileserver import FileServer
from upcall.testing.lab.kerberos import FOREIGN_SERVER, UNKNOWN_SERVER, Realm, replaced
from upcall.testing.lab.stage import Person, Task, person, serving, wait_until

MACHINES = '[request-key."cifs.spnego"]\nwithout-daemon = "machine"\n'


# What the service manager does elsewhere.
_SETTINGS = dumps(DaemonSettings(plugins=Plugins(handlers=(ServiceHandler(SERVICE, "upcall_spnego:handler"),))))
_DAEMON = f"{sys.executable} -P -m upcall.daemon {shlex.quote(_SETTINGS)}"
_START = ["sh", "-c", f"setpriv --reuid={{uid}} --regid={{uid}} --clear-groups {_DAEMON} &"]
STARTED = f"""
[daemon]
start = {json.dumps(_START)}
[request-key."{SERVICE}"]
without-daemon = "start"
"""


@pytest.fixture
def patience() -> float:
    """Seconds that the broker gives a daemon: less than it does otherwise, so that the tests end soon."""
    return 3.0


@pytest.fixture(autouse=True)
def impatient(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is forked from this process."""
    rules = SERVICES[SERVICE]._replace(patience=patience)
    monkeypatch.setattr(server, "SERVICES", {**SERVICES, SERVICE: rules})


@pytest.fixture(autouse=True)
def scene(
    impatient: None, house: House, kerberos: Realm, share: FileServer, alice: Person, bob: Person
) -> Iterator[None]:
    """We answer the kernel; nobody has a ticket."""
    with ours():
        yield
    for who in (alice, bob, person("root")):
        kerberos.logout(who)


def _refused(attempt: Callable[[], Outcome], reason: str) -> None:
    """What the broker counts, and the errno that belongs to it."""
    outcome = attempt()
    assert outcome.errno == REASONS[reason], outcome
    assert counts()[reason]


def _helped(who: Person) -> None:
    assert mounting(who).errno == 0


# --- tickets -------------------------------------------------------------------------------------------------


def test_without_a_ticket_a_mount_is_refused(house: House, kerberos: Realm, alice: Person) -> None:
    house.daemon(alice, spnego)
    _refused(lambda: mounting(alice), "no-ticket")
    kerberos.login(alice)
    _helped(alice)


def test_with_an_expired_ticket_a_mount_is_refused(house: House, kerberos: Realm, alice: Person) -> None:
    house.daemon(alice, spnego)
    kerberos.login_for_a_moment(alice)
    _refused(lambda: mounting(alice), "ticket-expired")
    kerberos.login(alice)
    _helped(alice)


# --- the KDC -------------------------------------------------------------------------------------------------


def test_a_kdc_that_is_down_is_a_refusal(house: House, kerberos: Realm, alice: Person) -> None:
    """Who has a ticket for the server already does not notice; the others must wait until it is back."""
    house.daemon(alice, spnego)
    kerberos.login(alice)
    kerberos.stop()
    try:
        _refused(lambda: mounting(alice), "kdc-unreachable")
        kerberos.start()
        _helped(alice)
        kerberos.stop()
        _helped(alice)
    finally:
        kerberos.stop()
        kerberos.start()


def test_a_kdc_that_says_nothing_times_out_and_holds_nobody_else_up(
    house: House, kerberos: Realm, alice: Person, bob: Person
) -> None:
    for who in (alice, bob):
        house.daemon(who, spnego)
        kerberos.login(who)
    _helped(bob)  # has a ticket for the server from now on
    kerberos.pause()
    try:
        _refused(lambda: mounting(alice), "timed-out")
        _helped(bob)
    finally:
        kerberos.go_on()
    _helped(alice)


def test_a_server_that_the_kdc_does_not_know(house: House, kerberos: Realm, alice: Person) -> None:
    house.daemon(alice, spnego)
    kerberos.login(alice)
    _refused(lambda: mounting(alice, host=UNKNOWN_SERVER), "unknown-service")
    _helped(alice)


def test_a_server_of_a_realm_that_nobody_serves(house: House, kerberos: Realm, alice: Person) -> None:
    house.daemon(alice, spnego)
    kerberos.login(alice)
    _refused(lambda: mounting(alice, host=FOREIGN_SERVER), "wrong-realm")
    _helped(alice)


# --- broker and daemon ---------------------------------------------------------------------------------------


def test_without_a_broker_a_mount_is_refused(house: House, kerberos: Realm, alice: Person) -> None:
    daemon = house.daemon(alice, spnego)
    kerberos.login(alice)
    assert house.broker is not None
    house.broker.end()
    assert mounting(alice).errno == errno.ENOTCONN
    house.open()
    wait_until(lambda: serving(alice.uid) == daemon.pid, "the daemon")
    _helped(alice)


def test_without_a_daemon_a_mount_is_refused(house: House, kerberos: Realm, alice: Person) -> None:
    kerberos.login(alice)
    _refused(lambda: mounting(alice), "no-daemon")
    house.daemon(alice, spnego)
    _helped(alice)


def test_root_has_the_machines_keytab(house: House, kerberos: Realm, root: Person) -> None:
    house.daemon(root, spnego)
    _refused(lambda: mounting(root), "no-ticket")
    with kerberos.installed_keytab():
        _helped(root)


def test_no_daemon_but_the_machines(
    house: House, kerberos: Realm, share: FileServer, alice: Person, root: Person
) -> None:
    """If the configuration says so: in the machine's name, and never by root's own ticket, which is bob's here."""
    kerberos.login(root, "bob")
    config.SYSTEM.parent.mkdir(exist_ok=True)
    assert house.broker is not None
    house.broker.end()
    with kerberos.installed_keytab(), replaced(config.SYSTEM, lambda _: MACHINES):
        house.open()
        house.daemon(root, spnego)
        with mount_for(alice) as folder:
            (folder / "by-the-machine").touch()
            assert (share.files / "by-the-machine").stat().st_uid == root.uid


@pytest.mark.parametrize("patience", [SERVICES[SERVICE].patience])
def test_no_daemon_but_one_is_started(house: House, kerberos: Realm, alice: Person) -> None:
    """By the command that the configuration names, while the mount waits. To start Python can take an emulated
    processor longer than that: then the next one finds it."""
    kerberos.login(alice)
    config.SYSTEM.parent.mkdir(exist_ok=True)
    assert house.broker is not None
    house.broker.end()
    with replaced(config.SYSTEM, lambda _: STARTED):
        house.open()
        wait_until(lambda: mounting(alice).errno == 0, "a mount")
    pid = serving(alice.uid)
    assert pid is not None
    assert Path(f"/proc/{pid}").stat().st_uid == alice.uid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: serving(alice.uid) is None, "the daemon's end")


@pytest.mark.parametrize("patience", [SERVICES[SERVICE].patience])
def test_a_stopped_daemon_times_out_and_serves_again_afterwards(house: House, kerberos: Realm, alice: Person) -> None:
    daemon = house.daemon(alice, spnego)
    kerberos.login(alice)
    daemon.send_signal(signal.SIGSTOP)
    _refused(lambda: mounting(alice), "timed-out")
    daemon.send_signal(signal.SIGCONT)
    _helped(alice)


def test_a_daemon_that_is_killed_meanwhile(house: House, kerberos: Realm, alice: Person) -> None:
    daemon = house.daemon(alice, lambda: Blocking(house.gate()))
    kerberos.login(alice)
    task = begin_mounting(alice)
    wait_until(lambda: pending(alice) == 1, "the request")
    daemon.send_signal(signal.SIGKILL)
    _refused(task.result, "daemon-gone")
    house.daemon(alice, spnego)
    _helped(alice)


@pytest.mark.parametrize("patience", [SERVICES[SERVICE].patience])
def test_a_handler_that_hangs_while_others_mount_and_write(
    house: House, kerberos: Realm, alice: Person, bob: Person, root: Person
) -> None:
    """The kernel makes mounts one after the other: bob's has to wait for alice's, and not for ever. His files on a
    mount that is there do not, although that takes a session of his own."""
    gate = house.gate()
    house.daemon(alice, lambda: Blocking(gate))
    for who in (bob, root):
        house.daemon(who, spnego)
    for who in (alice, bob):
        kerberos.login(who)
    kerberos.login(root, "alice")
    with shared_mount(root) as folder:
        alices = begin_mounting(alice)
        wait_until(lambda: pending(alice) == 1, "alice's request")
        assert attempt(bob, writing(folder, bob)).errno == 0
        assert pending(alice) == 1
        bobs = begin_mounting(bob)
        _refused(alices.result, "timed-out")
        assert bobs.result().errno == 0
    gate.open()
    _helped(alice)


def test_a_request_that_nobody_waits_for_any_more(house: House, kerberos: Realm, alice: Person) -> None:
    """Who mounts is killed meanwhile: it ends as soon as the answer is there, whatever it is."""
    gate = house.gate()
    house.daemon(alice, lambda: Blocking(gate))
    kerberos.login(alice)
    task: Task[Outcome] = begin_mounting(alice)
    wait_until(lambda: pending(alice) == 1, "the request")
    task.send_signal(signal.SIGKILL)
    gate.open()
    wait_until(lambda: task.ended, "the mount to end")
    _helped(alice)
