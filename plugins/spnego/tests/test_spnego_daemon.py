"""In a real daemon, asked by a played broker; and what it says in its log."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_spnego.acceptor import accept
from upcall_spnego.mitkdc import UNKNOWN, Realm, asking

from upcall.core.messages import Answer, Refusal
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.protocols.request_key.cifs_spnego import take_payload
from upcall.protocols.request_key.messages import take_instance
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import RunningDaemon
from upcall.wire.envelope import Response

SERVICE = "cifs.spnego"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name: the path of a socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="upcall-") as name:
        yield Path(name)


@pytest.fixture
def broker(folder: Path) -> PlayedBroker:
    return PlayedBroker(folder / "broker")


@pytest.fixture
def daemon(realm: Realm, folder: Path, broker: PlayedBroker) -> Iterator[RunningDaemon]:
    """Its handler is loaded when it is asked for the first time."""
    lazy = DaemonSettings(plugins=Plugins(handlers=(ServiceHandler(SERVICE, "upcall_spnego:handler"),)))
    home = realm.at_home(folder)
    with RunningDaemon(broker_folder(folder), folder / "keys", {}, settings=lazy, environment=home) as running:
        broker.register()
        yield running


def broker_folder(folder: Path) -> Path:
    return folder / "broker"


def asked(broker: PlayedBroker, seq: int, body: bytes) -> Response:
    broker.ask(seq, body, SERVICE, timeout=8.0)
    return broker.response()


def test_a_daemon_answers_once_there_is_a_ticket_and_logs_no_secret(
    realm: Realm, broker: PlayedBroker, daemon: RunningDaemon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One daemon, before and after kinit; nothing secret reaches its log."""
    monkeypatch.setenv("KRB5RCACHENAME", "none:")
    assert asked(broker, 1, asking().body).outcome == Refusal("no-ticket", 126)
    realm.kinit("alice", f"FILE:{folder}/default")
    response = asked(broker, 2, asking().body)
    assert isinstance(response.outcome, Answer)
    key, blob = take_payload(take_instance(response.outcome.body).payload)
    assert accept(blob, realm.keytab)[:2] == ("alice@LAB.TEST", key)
    assert asked(broker, 3, asking(host=UNKNOWN).body).outcome == Refusal("unknown-service", 129)
    assert asked(broker, 4, asking().body[:-1]).outcome == Refusal("bad-request", 74)
    daemon.logged("reason=unknown-service")
    said = daemon.log
    assert f"Server cifs/{UNKNOWN}@LAB.TEST not found" in said
    for secret in (key, blob):
        assert secret.hex() not in said
        assert repr(secret)[2:-1] not in said
    assert repr(response.outcome).find(key.hex()) < 0


def test_a_ticket_in_use_costs_a_daemon_less_than_13_mb(
    realm: Realm, broker: PlayedBroker, daemon: RunningDaemon, folder: Path
) -> None:
    """Prints the memory that a daemon needs more with the library and a ticket in use."""
    realm.kinit("alice", f"FILE:{folder}/default")
    before = _resident(daemon.pid)
    for seq in range(1, 200):
        assert isinstance(asked(broker, seq, asking().body).outcome, Answer)
    added = _resident(daemon.pid) - before
    print(f"\ndaemon: {before / 1e6:.1f} MB, and {added / 1e6:.1f} MB more with cifs.spnego in use")
    assert added < 13e6


def _resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
