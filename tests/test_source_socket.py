"""source.sock, where sources in processes of their own talk to the broker: access, answers and registrations."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker_thread import BrokerThread, Link
from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel.local import connect
from upcall.protocols import quota
from upcall.testing.played import PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, in_child, until
from upcall.wire.envelope import (
    MAX_MESSAGE,
    NOTICE,
    REQUEST,
    Envelope,
    Response,
    pack_control,
    pack_request,
    pack_response,
    take_request,
)
from upcall.wire.source_link import (
    REGISTERED,
    STATUS,
    UNREGISTERED,
    FromSource,
    Registrations,
    pack_from_source,
    pack_status,
    take_to_source,
)

ALICE, BOB, MACHINE, STRANGER = 5001, 5002, 990, 54321
WRAP = bytes.fromhex("42 10") + b"80f0e50e8a936f95" + bytes.fromhex("05 00 01 02 00 03")


class Source:
    """A played source."""

    def __init__(self, folder: Path, name: str = "quota") -> None:
        self.socket = connect(folder / "source.sock", frozenset({os.geteuid()}))
        self.socket.settimeout(PATIENCE)
        self.name = name

    def status(self, **said: Any) -> Source:
        self.socket.send(pack_status(self.name, 0, said))
        return self

    def hear(self) -> Response | Registrations:
        return take_to_source(self.socket.recv(MAX_MESSAGE))

    def heard(self, *uids: int, kind: int = REGISTERED, whole: bool = False) -> None:
        found = self.hear()
        assert isinstance(found, Registrations)
        assert found == Registrations(kind, tuple(sorted(uids)), whole), found

    def send(self, target: int, service: str = "quota", body: bytes = b"{}", kind: int = NOTICE, seq: int = 7) -> None:
        envelope = Envelope(seq, 3, service, Requester(BOB, 0), 0, body)
        self.socket.send(pack_from_source(FromSource(kind, target, envelope)))

    def outcome(self, seq: int = 7) -> str:
        """ "", or the reason."""
        found = self.hear()
        assert isinstance(found, Response)
        assert (found.seq, found.index) == (seq, 3)
        return found.outcome.reason if isinstance(found.outcome, Refusal) else ""

    def told(self, *args: Any, **more: Any) -> str:
        self.send(*args, **more)
        return self.outcome()

    def closed(self) -> bool:
        """Waits until the broker has; what it still says is passed over."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(MAX_MESSAGE):
                pass
        return True


@pytest.fixture
def broker(folder: Path) -> Iterator[BrokerThread]:
    made = BrokerThread(folder)
    made.do(lambda: setattr(made.router, "machine", MACHINE))
    yield made
    made.close()


@pytest.fixture
def source(broker: BrokerThread, folder: Path) -> Iterator[Source]:
    made = Source(folder).status(listening=True)
    made.heard(whole=True)
    yield made
    made.socket.close()


def notices(link: Link) -> list[Envelope]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while data := link.theirs.recv(MAX_MESSAGE):
            found.append(take_request(data))
    return found


# --- registrations -------------------------------------------------------------------------------------------


def test_a_source_hears_all_registrations_first_and_then_each_change(broker: BrokerThread, folder: Path) -> None:
    alice = broker.daemon(ALICE, Link())
    made = Source(folder).status()
    made.heard(ALICE, whole=True)
    broker.daemon(BOB, Link())
    made.heard(BOB)
    broker.gone(alice)
    made.heard(ALICE, kind=UNREGISTERED)
    broker.daemon(BOB, Link())  # a newer one
    made.heard(BOB)


def test_the_machines_daemon_is_uid_0_as_well_and_roots_own_is_not(broker: BrokerThread, source: Source) -> None:
    broker.daemon(0, Link())
    machines = broker.daemon(MACHINE, Link())
    source.heard(0, MACHINE)
    broker.gone(machines)
    source.heard(0, MACHINE, kind=UNREGISTERED)


def test_a_change_of_the_machines_daemon_sends_the_whole_list(broker: BrokerThread, source: Source) -> None:
    broker.daemon(ALICE, Link())
    source.heard(ALICE)

    def change() -> None:
        broker.router.machine = ALICE
        broker.sources.follow({})

    broker.do(change)
    source.heard(0, ALICE, whole=True)


def test_a_long_list_of_registrations_takes_several_messages(
    broker: BrokerThread, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcall.wire.source_link.MOST_UIDS", 2)
    for uid in range(ALICE, ALICE + 5):
        broker.daemon(uid, Link())
    made = Source(folder).status()
    made.heard(ALICE, ALICE + 1, whole=True)
    made.heard(ALICE + 2, ALICE + 3)
    made.heard(ALICE + 4)


def test_a_source_that_does_not_read_is_disconnected(broker: BrokerThread, source: Source, folder: Path) -> None:
    for _ in range(2000):
        broker.daemon(ALICE, Link())
        if "quota" not in broker.sources.connected:
            break
    assert source.closed()
    again = Source(folder).status()
    again.heard(ALICE, whole=True)


# --- notices -------------------------------------------------------------------------------------------------


def test_a_notice_reaches_the_daemon_once_with_the_uid_that_caused_it(broker: BrokerThread, source: Source) -> None:
    link = Link()
    broker.daemon(ALICE, link)
    source.heard(ALICE)
    assert source.told(ALICE, body=b"body") == ""
    (told,) = notices(link)
    assert (told.service, told.requester, told.body) == ("quota", Requester(BOB, 0), b"body")


def test_a_notice_without_a_daemon_or_to_a_full_one_is_refused(broker: BrokerThread, source: Source) -> None:
    assert source.told(ALICE) == "no-daemon"
    link = Link()
    alice = broker.daemon(ALICE, link)
    source.heard(ALICE)
    with contextlib.suppress(BlockingIOError):
        while True:
            link.ours.send(bytes(1000))
    assert source.told(ALICE) == "daemon-full"
    broker.do(lambda: setattr(alice, "leaving", True))
    assert source.told(ALICE) == "daemon-full"


def test_a_notice_for_root_goes_to_the_machines_daemon(broker: BrokerThread, source: Source) -> None:
    roots, machines = Link(), Link()
    broker.daemon(0, roots)
    assert source.told(0) == "no-daemon"
    broker.daemon(MACHINE, machines)
    source.heard(0, MACHINE)
    assert source.told(0) == ""
    assert (len(notices(roots)), len(notices(machines))) == (0, 1)


@pytest.mark.parametrize("service", ["key", "ecryptfs", "nonsense"])
def test_a_notice_of_a_service_without_notices_is_refused(broker: BrokerThread, source: Source, service: str) -> None:
    assert source.told(ALICE, service) == "no-service"


# --- requests ------------------------------------------------------------------------------------------------


def test_a_request_is_asked_of_the_uids_daemon_and_answered(broker: BrokerThread, source: Source) -> None:
    link = Link()
    alice = broker.daemon(ALICE, link)
    source.heard(ALICE)
    source.send(ALICE, "key", WRAP, REQUEST)
    link.theirs.setblocking(True)
    link.theirs.settimeout(PATIENCE)
    asked = take_request(link.theirs.recv(MAX_MESSAGE))
    assert (asked.service, asked.requester.uid, asked.body) == ("key", BOB, WRAP)
    answer = pack_response(asked.seq, asked.index, Refusal("no-key", 126))
    assert broker.do(lambda: broker.router.answered(alice, answer))
    assert source.outcome() == "no-key"


@pytest.mark.parametrize(
    ("service", "body", "reason"),
    [("key", WRAP, "no-daemon"), ("key", b"nonsense", "bad-request"), ("quota", b"", "no-service")],
)
def test_a_request_that_cannot_be_routed_is_refused_with_the_reason(
    source: Source, service: str, body: bytes, reason: str
) -> None:
    assert source.told(ALICE, service, body, REQUEST) == reason


def test_a_request_is_refused_by_its_deadline(broker: BrokerThread, source: Source) -> None:
    broker.daemon(ALICE, Link())
    source.heard(ALICE)
    envelope = Envelope(7, 3, "key", Requester(BOB, 0), 1, WRAP)
    source.socket.send(pack_from_source(FromSource(REQUEST, ALICE, envelope)))
    assert source.outcome() == "timed-out"


# --- who may, and nonsense -----------------------------------------------------------------------------------


def test_the_socket_has_mode_0600(broker: BrokerThread, folder: Path) -> None:
    assert (folder / "source.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_connection_from_another_uid_is_refused(broker: BrokerThread, source: Source, folder: Path) -> None:
    path = folder / "source.sock"

    def tried() -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(PATIENCE)
            try:
                stranger.connect(str(path))
                with contextlib.suppress(BrokenPipeError):
                    stranger.send(pack_status("quota", 0, {}))
                return f"heard {stranger.recv(MAX_MESSAGE)!r}"
            except OSError as error:
                return type(error).__name__

    assert in_child(tried, STRANGER) == "PermissionError"
    path.chmod(0o666)
    assert in_child(tried, STRANGER) in ("heard b''", "ConnectionResetError")
    assert source.told(ALICE) == "no-daemon"


def test_a_second_source_of_the_name_is_refused(broker: BrokerThread, source: Source, folder: Path) -> None:
    second = Source(folder).status()
    found = second.hear()
    assert isinstance(found, Response)
    assert found.outcome == Refusal("duplicate", 114)
    assert second.closed()
    assert source.told(ALICE) == "no-daemon"
    source.socket.close()
    until(lambda: not broker.do(lambda: broker.sources.connected), "the first has gone")
    Source(folder).status().heard(whole=True)


@pytest.mark.parametrize("name", ["key", "nonsense"])
def test_a_source_with_an_unknown_name_is_refused(broker: BrokerThread, folder: Path, name: str) -> None:
    made = Source(folder, name).status()
    found = made.hear()
    assert isinstance(found, Response)
    assert found.outcome == Refusal("no-service", 95)
    assert made.closed()


NOTICED = pack_from_source(FromSource(NOTICE, ALICE, Envelope(7, 3, "quota", Requester(0, 0), 0, b"{}")))


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(16),
        bytes(24),
        bytes(range(256)),
        pack_control(100),
        NOTICED,  # before it has said who it is
        pack_request(Envelope(0, 0, "quota", Requester(0, 0), 0, b"[]"), STATUS),
        pack_request(Envelope(0, 0, "quota", Requester(0, 0), 0, b"{" * 8000), STATUS),
        pack_status("quota", 0, {})[:-1],
        b"x" * (MAX_MESSAGE + 1),
    ],
    ids=[
        "one byte",
        "zeros for a header",
        "zeros",
        "all bytes",
        "another type",
        "a notice first",
        "a list as status",
        "a deep status",
        "cut short",
        "too long",
    ],
)
def test_a_source_that_begins_with_a_malformed_message_is_disconnected(
    broker: BrokerThread, folder: Path, data: bytes
) -> None:
    made = Source(folder)
    made.socket.send(data)
    assert made.closed()
    Source(folder).status().heard(whole=True)


def targetless(kind: int, size: int) -> bytes:
    return pack_request(Envelope(7, 3, "quota", Requester(0, 0), 0, bytes(size)), kind)


@pytest.mark.parametrize(
    "data",
    [
        targetless(NOTICE, 3),
        targetless(REQUEST, 0),
        NOTICED[:-1],
        NOTICED + b"x",
        NOTICED[:4] + struct.pack("=H", 999) + NOTICED[6:],
        NOTICED[:24] + b"\2" + NOTICED[25:],  # another version
        NOTICED[:25] + b"\0" + NOTICED[26:],  # no name
        NOTICED[:25] + b"\xff" + NOTICED[26:],  # a name longer than all
        NOTICED[:48] + b"\xff" + NOTICED[49:],  # a name that is not ASCII
    ],
    ids=[
        "no target",
        "no body",
        "cut short",
        "a byte too many",
        "another type",
        "another version",
        "no name",
        "a long name",
        "a name not ASCII",
    ],
)
def test_a_malformed_message_with_a_number_is_refused_once(broker: BrokerThread, source: Source, data: bytes) -> None:
    source.socket.send(data)
    assert source.outcome() == "bad-request"
    assert source.told(ALICE) == "no-daemon"  # and the next one is understood


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 23,
        pack_status("cifs", 0, {}),  # it was "quota"
        pack_request(Envelope(0, 0, "quota", Requester(0, 0), 0, b"nonsense"), STATUS),
        b"x" * (MAX_MESSAGE + 1),
    ],
    ids=["a short header", "another name", "a status that is no JSON", "too long"],
)
def test_a_malformed_message_without_a_number_ends_the_connection(
    broker: BrokerThread, source: Source, data: bytes
) -> None:
    source.socket.send(data)
    assert source.closed()


def test_requesters_are_served_while_a_source_floods(broker: BrokerThread, source: Source, folder: Path) -> None:
    """A source that floods has one turn among others."""
    source.socket.setblocking(False)
    with PlayedRequester(folder) as requester, contextlib.suppress(BlockingIOError, ConnectionError):
        for _ in range(20):
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while True:
                    source.socket.send(NOTICED)
            requester.ask(b"", "broker.status")
            assert isinstance(requester.response().outcome, Answer)


def test_the_broker_imports_nothing_that_only_quotas_need() -> None:
    """Neither the kernel's quotas and generic netlink, nor the state, nor what makes notices."""
    code = "import sys, upcall.broker.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    loaded = set(done.stdout.split())
    assert "upcall.broker.source_listener" in loaded
    ours = {f"upcall.kernel.{name}" for name in ("genetlink", "mounts", "quotactl")}
    ours |= {f"upcall.protocols.quota.{path.stem}" for path in Path(quota.__file__).parent.glob("[!_]*.py")}
    known = {f"upcall.protocols.quota.{name}" for name in ("configuration", "protocol")}
    assert loaded & ours == known


# --- the status ----------------------------------------------------------------------------------------------


def test_the_status_of_a_source_is_in_the_brokers_status(broker: BrokerThread, folder: Path) -> None:
    def said() -> object:
        return broker.do(lambda: broker.server.status(None))["quota"]

    assert said() == {}
    made = Source(folder).status(received=1)
    made.heard(whole=True)
    assert said() == {"received": 1}
    made.status(received=2)
    until(lambda: said() == {"received": 2}, "the newer one")
    made.socket.close()
    until(lambda: said() == {}, "none")


def test_a_connection_ends_with_the_brokers_process(folder: Path) -> None:
    with RunningBroker(folder) as running:
        made = Source(folder).status()
        assert isinstance(made.hear(), Registrations)
        running.signal(15)
        assert running.wait() == 0
        assert made.closed()
    assert not (folder / "source.sock").exists()
