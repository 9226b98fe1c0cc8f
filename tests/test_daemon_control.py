"""The user's own commands to the user's daemon: unlock, lock, status; and one daemon after another."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from upcall.core.errors import Refused
from upcall.kernel.local import connect, listen
from upcall.kernel.netlink import give_pair, is_control, pair
from upcall.process import control as control_module
from upcall.process.control import DaemonControl, NoDaemon
from upcall.process.paths import daemon_socket
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import ONLY_AGENT, RunningBroker, RunningDaemon, StartDaemon, in_child, until
from upcall.testing.toy import make_toy_key
from upcall.wire.envelope import HELO, pack_control

KEY = b"0123456789abcdef"
PASSPHRASE = b"open sesame"
SECRET = "correct-horse-battery-staple"  # in exceptions of tests/misbehaving.py
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
pytestmark = pytest.mark.usefixtures("runtime_folder")


@pytest.fixture
def protected(folder: Path, keyring: FolderKeyring) -> str:
    """A key whose passphrase is asked for."""
    name, blob = make_toy_key(folder.parent / "protected.key", PASSPHRASE)
    return keyring.add(name, "toy", blob)


def refusal_of(broker: RunningBroker, signature: str) -> str:
    with broker.client() as client:
        try:
            client.wrap(signature, KEY)
        except Refused as refused:
            return refused.reason
    return "answered"


def test_a_key_is_refused_when_locked_and_answers_when_unlocked(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str
) -> None:
    daemon = start_daemon(broker, control=True)
    with DaemonControl() as control:
        assert refusal_of(broker, protected) == "locked"
        control.unlock(protected, bytearray(b"wrong"))
        assert refusal_of(broker, protected) == "module-failed"
        control.unlock(protected, bytearray(PASSPHRASE))
        assert refusal_of(broker, protected) == "answered"
        assert control.status()["keys"] == [{"signature": protected, "module": "toy", "open": True}]
        assert control.lock(protected) == 1
        assert refusal_of(broker, protected) == "locked"
        assert control.status()["keys"] == [{"signature": protected, "locked": True}]
        control.unlock(protected, bytearray(PASSPHRASE))
        assert control.lock(None) == 1
        assert refusal_of(broker, protected) == "locked"
    for secret in (PASSPHRASE.decode(), "wrong"):
        assert secret not in daemon.log


def why_refused(broker: RunningBroker, signature: str) -> str:
    with broker.client() as client, pytest.raises(Refused) as refused:
        client.wrap(signature, KEY)
    return refused.value.why


def test_the_users_own_requester_is_told_why(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str, keyring: FolderKeyring
) -> None:
    keyring.add("feedfeedfeedfeed", "bad", b"open_raises")
    keyring.add("badbadbadbadbadb", "moon", b"")
    daemon = start_daemon(broker, control=True)
    with DaemonControl() as control:
        control.unlock(protected, bytearray(b"wrong"))
        assert why_refused(broker, protected)  # the module's own words
        control.lock(protected)
        assert re.fullmatch(r"locked since [\d :-]+ \(upcall lock\)", why_refused(broker, protected))
        told = control.status()["last_refusal"]
        assert (told["reason"], told["service"]) == ("locked", "key")
    assert why_refused(broker, "badbadbadbadbadb").startswith("key module 'moon'")
    assert SECRET not in why_refused(broker, "feedfeedfeedfeed")
    assert "reason=locked" not in daemon.log, "a locked key fills no log"


def test_a_locked_key_is_listed_with_cause_and_time(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str
) -> None:
    start_daemon(broker, control=True)
    with DaemonControl() as control:
        before = time.time()
        assert control.unlock(protected, bytearray(PASSPHRASE)) is False
        assert control.status()["passphrases"] == [protected]
        control.lock(protected)
        (lock,) = control.status()["locks"]
        assert (lock["cause"], lock["signature"]) == ("command", protected)
        assert before <= lock["since"] <= time.time()
        control.lock(None)
        assert [(lock["signature"], lock.get("unlocked")) for lock in control.status()["locks"]] == [
            (protected, None),
            (None, []),
        ]
        assert control.unlock(protected, bytearray(PASSPHRASE)) is True
        assert control.unlock(protected, bytearray(PASSPHRASE)) is False
        assert control.unlock_all() is True
        assert control.unlock_all() is False
        assert control.status()["locks"] == []


def test_a_module_that_raises_during_unlock_refuses_the_key_and_the_daemon_lives(
    broker: RunningBroker, start_daemon: StartDaemon, keyring: FolderKeyring
) -> None:
    keyring.add("feedfeedfeedfeed", "bad", b"open_raises")
    daemon = start_daemon(broker, control=True)
    with DaemonControl() as control:
        control.unlock("feedfeedfeedfeed", bytearray(b"x"))
        assert refusal_of(broker, "feedfeedfeedfeed") == "module-broke"
        assert control.status()["keys"] == []
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert SECRET not in daemon.log


@pytest.mark.parametrize(
    ("service", "body", "reason"),
    [
        ("daemon.unlock", b"short", "bad-request"),
        ("daemon.lock", b"x" * 16, "bad-request"),
        ("moon", b"", "no-service"),
    ],
)
def test_malformed_or_unknown_commands_are_refused(
    broker: RunningBroker, start_daemon: StartDaemon, service: str, body: bytes, reason: str
) -> None:
    start_daemon(broker, control=True)
    with DaemonControl() as control, pytest.raises(Refused, match=reason):
        control._ask(service, body)


def test_junk_ends_a_control_connection_and_a_silent_one_blocks_no_request(
    broker: RunningBroker, start_daemon: StartDaemon, runtime_folder: Path, signature: str
) -> None:
    start_daemon(broker, control=True)
    path = runtime_folder / "upcall" / "daemon.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for junk in (b"x", bytes(100), b""):
        with connect(path, frozenset({os.geteuid()})) as connection:
            if junk:
                connection.send(junk)
                assert connection.recv(1) == b""
    with connect(path, frozenset({os.geteuid()})), broker.client() as client:  # says nothing: requests go on
        assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
    with DaemonControl() as control:
        assert control.status()["keys"]


def test_a_control_client_raises_no_daemon_without_one() -> None:
    with pytest.raises(NoDaemon):
        DaemonControl()


def test_a_newer_daemon_takes_over_the_control_socket(
    broker: RunningBroker, start_daemon: StartDaemon, signature: str
) -> None:
    first = start_daemon(broker, control=True)
    second = start_daemon(broker, control=True)
    assert first.wait() == 0
    with DaemonControl() as control:  # the first, on its way out, has not taken the second's socket away
        assert control.status()["pid"] == second.pid
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    with pytest.raises(NoDaemon):
        DaemonControl()


def test_a_socket_that_is_taken_over_after_a_failed_connection_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's own socket gets the common name between the two looks of a command."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = daemon_socket()

    def taken_over(_: Path) -> list[tuple[Path, bool]]:
        listener.append(listen(path, 0o600))
        return []

    listener: list[socket.socket] = []
    monkeypatch.setattr(control_module, "own_daemon_sockets", taken_over)
    DaemonControl()
    (listening,) = listener
    listening.close()
    path.unlink()
    monkeypatch.setattr(control_module, "own_daemon_sockets", lambda _: [])
    with pytest.raises(NoDaemon):
        DaemonControl()


def test_of_daemons_that_start_at_once_the_registered_one_has_the_control_socket(
    broker: RunningBroker, start_daemon: StartDaemon
) -> None:
    """Otherwise `lock` would report success, and the registered daemon would go on using the keys."""
    started = [start_daemon(control=True) for _ in range(4)]
    until(lambda: sum(one.process.poll() is None for one in started) == 1, "one is left")
    (left,) = (one for one in started if one.process.poll() is None)
    broker.registered(left.pid)
    with DaemonControl() as control:
        assert control.status()["pid"] == left.pid


def test_a_daemon_whose_helo_is_not_answered_does_not_take_the_control_socket(
    folder: Path, start_daemon: StartDaemon, signature: str, runtime_folder: Path
) -> None:
    """As in another pid namespace, where the broker rejects it."""
    with (
        RunningBroker(folder.with_name("first")) as broker,
        RunningDaemon(broker.folder, folder.parent / "keys", {}, control=True, settings=ONLY_AGENT) as serving,
    ):
        broker.registered(serving.pid)
        played = PlayedBroker(folder)
        start_daemon(control=True)
        connection, _ = played.listener.accept()
        assert is_control(connection.recv(64), HELO)
        ours, far = pair()
        give_pair(connection, pack_control(HELO), ours, far)
        until(ours.receive, "its HELO")
        with DaemonControl() as control:
            assert control.status()["pid"] == serving.pid


def test_an_unregistered_daemon_does_not_take_the_control_socket(
    broker: RunningBroker, start_daemon: StartDaemon, folder: Path
) -> None:
    """Otherwise `lock` would report success, and the registered daemon would go on using the keys."""
    registered = start_daemon(broker, control=True)
    nowhere = folder.with_name("nowhere")  # with the same runtime folder of the user
    with RunningDaemon(nowhere, folder.parent / "keys", {}, control=True, settings=ONLY_AGENT) as waiting:
        until(lambda: "broker-unavailable" in waiting.log or None, "it waits")
        with DaemonControl() as control:
            assert control.status()["pid"] == registered.pid
    with DaemonControl() as control:
        assert control.status()["pid"] == registered.pid


def test_the_control_socket_of_a_killed_daemon_is_replaced(broker: RunningBroker, start_daemon: StartDaemon) -> None:
    start_daemon(broker, control=True).kill()
    until(lambda: broker.daemon() is None, "the broker knows")
    second = start_daemon(broker, control=True)
    with DaemonControl() as control:
        assert control.status()["pid"] == second.pid


@root_only
def test_another_users_command_is_refused(
    broker: RunningBroker, start_daemon: StartDaemon, runtime_folder: Path
) -> None:
    """Even where the folder's mode would allow it."""
    start_daemon(broker, control=True)
    path = runtime_folder / "upcall" / "daemon.sock"
    for reachable in (runtime_folder, path.parent):
        reachable.chmod(0o755)
    path.chmod(0o666)

    def ask() -> str:
        with connect(path, frozenset({0})) as connection:
            try:
                connection.send(bytes(100))
                return "answered" if connection.recv(1) else "closed"
            except ConnectionError:
                return "closed"

    assert in_child(ask, uid=65534) == "closed"
