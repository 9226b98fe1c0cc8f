"""Notifications of broker and daemon to the service manager, with a socket in its place."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.broker.settings import BrokerSettings
from upcall.kernel.notify import Manager
from upcall.process.settings import dumps
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon, Started

MODULES = {"toy": "upcall.testing.toy:TOY"}


class Listening:
    """Plays a service manager: its socket, and the messages received there."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(os.fspath(path))
        self.socket.settimeout(PATIENCE)
        self.environment = {"NOTIFY_SOCKET": os.fspath(path).replace("\0", "@")}

    def hear(self, beginning: str) -> str:
        """The next message that begins so; what says only how things are may come in between."""
        while True:
            said = self.socket.recv(4096).decode()
            if said.startswith(beginning):
                return said
            assert said.startswith(("WATCHDOG=1", "STATUS=")), said


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listening]:
    made = Listening(tmp_path / "notify")
    yield made
    made.socket.close()


class Notifying(Started):
    """A broker that has a manager."""

    def __init__(self, folder: Path, manager: Listening, **environment: str) -> None:
        arguments = ["-m", "upcall.broker", dumps(BrokerSettings(folder))]
        super().__init__(arguments, folder.parent / "notifying.log", {**manager.environment, **environment})


# --- the words -----------------------------------------------------------------------------------------------------


def test_each_state_is_sent_in_the_service_managers_format(manager: Listening) -> None:
    told = Manager(dict(manager.environment))
    told.ready("serving")
    assert manager.hear("READY") == "READY=1\nSTATUS=serving"
    told.status("looking")
    assert manager.hear("STATUS") == "STATUS=looking"
    told.reloading()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.hear("RELOADING"))
    told.stopping()
    assert manager.hear("STOPPING") == "STOPPING=1"
    told.close()
    told.ready("too late")


def test_notifications_reach_an_abstract_socket() -> None:
    listening = Listening(f"\0upcall-test-{os.getpid()}")
    with listening.socket:
        Manager(dict(listening.environment)).stopping()
        assert listening.hear("STOPPING")


def test_notify_and_watchdog_variables_are_removed_from_the_environment(manager: Listening) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Manager(environment)
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", "/nobody/listens"])
def test_an_unusable_notify_socket_is_ignored(address: str) -> None:
    told = Manager({"NOTIFY_SOCKET": address})
    told.ready("serving")
    assert told.next_wake() == float("inf")


def test_a_service_manager_that_does_not_read_blocks_no_notification(manager: Listening) -> None:
    told = Manager(dict(manager.environment))
    for _ in range(5000):
        told.stopping()


def test_the_watchdog_message_is_sent_when_it_is_due(manager: Listening) -> None:
    told = Manager({**manager.environment, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())})
    for now in (100.0, 100.5, 101.0, 101.9):
        told.alive(now)
    manager.socket.setblocking(False)
    assert [manager.hear("WATCHDOG=1") for _ in range(2)] == ["WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        manager.hear("WATCHDOG=1")
    assert told.next_wake() == 102.0


@pytest.mark.parametrize(("interval", "whose"), [("", ""), ("0", ""), ("soon", ""), ("-1", ""), ("3000000", "1")])
def test_an_invalid_or_foreign_watchdog_interval_is_ignored(manager: Listening, interval: str, whose: str) -> None:
    told = Manager({**manager.environment, "WATCHDOG_USEC": interval, "WATCHDOG_PID": whose})
    assert told.next_wake() == float("inf")


# --- processes -----------------------------------------------------------------------------------------------------


def test_a_broker_notifies_ready_reloading_and_stopping(folder: Path, manager: Listening) -> None:
    with Notifying(folder, manager) as broker:
        assert str(folder) in manager.hear("READY=1")
        broker.signal(signal.SIGHUP)
        manager.hear("RELOADING=1")
        assert "reloaded" in manager.hear("READY=1")
        broker.signal(signal.SIGTERM)
        manager.hear("STOPPING=1")
        assert broker.wait() == 0


def test_a_broker_that_cannot_serve_never_notifies_ready(
    broker: RunningBroker, folder: Path, manager: Listening
) -> None:
    with Notifying(folder, manager) as second:
        assert second.wait() == os.EX_UNAVAILABLE
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.hear("READY")


def test_an_idle_broker_feeds_the_watchdog_and_a_stopped_one_does_not(folder: Path, manager: Listening) -> None:
    with Notifying(folder, manager, WATCHDOG_USEC="60000") as broker:
        manager.hear("READY=1")
        for _ in range(5):
            manager.hear("WATCHDOG=1")
        broker.stop()
        manager.socket.setblocking(False)
        with pytest.raises(BlockingIOError):  # what was said before, and then nothing
            while manager.hear("WATCHDOG=1"):
                pass
        manager.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            manager.hear("WATCHDOG=1")
        broker.go_on()
        manager.socket.settimeout(PATIENCE)
        manager.hear("WATCHDOG=1")


def test_a_daemon_notifies_ready_when_it_is_registered(
    folder: Path, keyring: FolderKeyring, manager: Listening
) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "60000"}
    with RunningDaemon(folder, folder.parent / "keys", MODULES, environment=environment) as daemon:
        manager.hear("STATUS=no broker")
        with RunningBroker(folder) as broker:
            assert str(broker.pid) in manager.hear("READY=1")
            broker.registered(daemon.pid)
        manager.hear("STATUS=the broker has gone")
        manager.hear("STATUS=no broker")
        for _ in range(5):
            manager.hear("WATCHDOG=1")
        with RunningBroker(folder):
            manager.hear("READY=1")
            daemon.signal(signal.SIGTERM)
            manager.hear("STOPPING=1")
            assert daemon.wait() == 0
