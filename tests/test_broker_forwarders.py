"""Forwarders and the broker, over the real socket; the kernel's words about keys are played."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.broker.server import Server
from upcall.client import Client
from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel.ancestry import line_of
from upcall.kernel.local import connect
from upcall.process.paths import Place
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.request_key import messages as requestkey
from upcall.protocols.request_key import origin as real
from upcall.protocols.request_key.cifs_spnego import pack_payload
from upcall.protocols.request_key.messages import Described, Instance, Upcall, pack_instance, pack_upcall, take_ask
from upcall.protocols.request_key.origin_check import Who
from upcall.protocols.request_key.source import Forwarders
from upcall.testing.kernel import broker_below, source_of
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, NotInTime, in_child, until
from upcall.wire.envelope import MAX_MESSAGE, Envelope, pack_request, take_response

ME = os.getuid()
DESCRIPTION = f"ver=0x2;host=fs;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid={ME:#x};pid=0x164".encode()
KEY, AUTHORISATION = 0x2F5C, 77
PAYLOAD = pack_payload(b"k" * 16, b"b" * 200)
GOOD = Answer(pack_instance(Instance(0, PAYLOAD)))


class Waiting:
    def __init__(self, who: Who) -> None:
        self.who, self.lives, self.closed = who, True, 0

    def close(self) -> None:
        self.closed += 1


class PlayedKeys:
    """What a kernel would say of one key and of the process that waits for it."""

    def __init__(self) -> None:
        self.keys = {
            KEY: Described("cifs.spnego", 0, 0, 0x39010000, DESCRIPTION),
            AUTHORISATION: Described(".request_key_auth", 0, 0, 0x0B010000, b"%x" % KEY),
        }
        self.waiting: list[Waiting] = []
        self.who: Who | None = Who(0x164, 0, 0, 1)
        self.asker = 0

    def key(self, serial: int) -> Described:
        if serial not in self.keys:
            raise OSError(126, "Required key not available")
        return self.keys[serial]

    def Process(self, pid: int) -> Waiting:
        assert pid == 0x164
        if self.who is None:
            raise ProcessLookupError("pid 356")
        self.waiting.append(Waiting(self.who))
        return self.waiting[-1]

    def started_at(self, pid: int) -> int:
        assert pid == os.getpid()
        return 100

    def asked_by(self, authorisation: int) -> int:
        assert authorisation == AUTHORISATION
        return self.asker


class Forwarder:
    """Asks once, as upcall-request-key does."""

    def __init__(self, folder: Path, keys: PlayedKeys) -> None:
        self.socket = connect(Place(folder).request_key_socket, frozenset({ME}))
        self.socket.settimeout(PATIENCE)
        self._keys = keys

    def ask(
        self,
        described: bytes | None = None,
        callout: bytes = b"",
        body: bytes | None = None,
        timeout: float = PATIENCE,
    ) -> int:
        """Returns the deadline that it has told, in nanoseconds of CLOCK_MONOTONIC."""
        if described is None:
            key = self._keys.keys[KEY]
            described = b"%b;%d;%d;%08x;%b" % (key.type.encode(), *key[1:])
        if body is None:
            body = pack_upcall(Upcall(KEY, AUTHORISATION, described, callout))
        deadline = int((time.monotonic() + timeout) * 1e9)
        self.socket.send(pack_request(Envelope(KEY, 0, requestkey.SERVICE, Requester(0, 0), deadline, body)))
        return deadline

    def outcome(self) -> Answer | Refusal:
        try:
            response = take_response(self.socket.recv(MAX_MESSAGE))
        except TimeoutError:
            raise NotInTime("the broker has not answered") from None
        assert (response.seq, response.index) == (KEY, 0)
        return response.outcome

    def reason(self) -> str:
        outcome = self.outcome()
        return outcome.reason if isinstance(outcome, Refusal) else "answered"


@pytest.fixture
def keys() -> PlayedKeys:
    return PlayedKeys()


@pytest.fixture
def server(keys: PlayedKeys, folder: Path) -> Iterator[Server]:
    with broker_below(None, folder, keys) as running:
        yield running


@pytest.fixture
def daemon(server: Server, folder: Path) -> Iterator[PlayedDaemon]:
    with PlayedDaemon(folder) as played:
        yield played


@pytest.fixture
def forwarder(server: Server, folder: Path, keys: PlayedKeys) -> Forwarder:
    return Forwarder(folder, keys)


def counts(folder: Path) -> dict[str, int]:
    with Client(folder) as client:
        found: dict[str, int] = client.status().get("request_key", {})
        return found


def test_a_forwarded_request_is_answered_and_its_process_released(
    daemon: PlayedDaemon, forwarder: Forwarder, keys: PlayedKeys
) -> None:
    forwarder.ask(callout=b"out")
    request = daemon.request()
    assert (request.service, request.requester) == ("cifs.spnego", Requester(0, 0x164))
    assert take_ask(request.body) == (DESCRIPTION, b"out")
    daemon.answer(request, GOOD)
    assert forwarder.outcome() == GOOD
    until(lambda: [one.closed for one in keys.waiting] == [1], "the process is let go")


def test_a_daemons_refusal_reaches_the_forwarder(daemon: PlayedDaemon, forwarder: Forwarder) -> None:
    forwarder.ask()
    daemon.answer(daemon.request(), Refusal("no-ticket", 126))
    assert forwarder.outcome() == Refusal("no-ticket", 126)


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<4I", 2, 0, 0, 200) + bytes(200),
        struct.pack("<4I", 2, 0, 16, 65000) + bytes(216),
        PAYLOAD[:-1],
        PAYLOAD + bytes(4),
        b"x",
    ],
    ids=["no key", "a blob beyond the end", "short", "long", "tiny"],
)
def test_an_invalid_payload_of_a_daemon_is_refused_as_bad_answer(
    daemon: PlayedDaemon, forwarder: Forwarder, payload: bytes
) -> None:
    forwarder.ask()
    daemon.answer(daemon.request(), Answer(pack_instance(Instance(0, payload))))
    assert forwarder.reason() == "bad-answer"


def test_a_replayed_answer_is_rejected(
    daemon: PlayedDaemon, forwarder: Forwarder, folder: Path, keys: PlayedKeys
) -> None:
    forwarder.ask()
    old = daemon.request()
    daemon.answer(old, GOOD)
    assert forwarder.reason() == "answered"
    another = Forwarder(folder, keys)
    another.ask()
    new = daemon.request()
    daemon.answer(old, GOOD)
    daemon.answer(new, Refusal("no-ticket", 126))
    assert another.reason() == "no-ticket"


def test_what_the_gate_denies_reaches_no_daemon(
    daemon: PlayedDaemon, forwarder: Forwarder, keys: PlayedKeys, folder: Path
) -> None:
    keys.keys[KEY] = keys.keys[KEY]._replace(uid=1001, gid=1001)
    forwarder.ask()
    assert forwarder.reason() == "forged"
    assert daemon.silent()
    until(lambda: "upcall-denied" in (folder.parent / "broker.log").read_text(), "a word in the log")


def test_a_description_that_the_kernel_does_not_confirm_is_refused_as_forged(
    daemon: PlayedDaemon, forwarder: Forwarder
) -> None:
    forwarder.ask(b"cifs.spnego;0;0;39010000;" + DESCRIPTION.replace(b"host=fs", b"host=gs"))
    assert forwarder.reason() == "forged"
    assert daemon.silent()


@pytest.mark.parametrize("missing", [KEY, AUTHORISATION])
def test_a_request_for_a_key_that_is_gone_is_refused_as_forged(
    forwarder: Forwarder, keys: PlayedKeys, missing: int
) -> None:
    described = b"cifs.spnego;0;0;39010000;" + DESCRIPTION
    del keys.keys[missing]
    forwarder.ask(described)
    assert forwarder.reason() == "forged"


def test_a_second_request_for_a_key_in_hand_is_refused_as_duplicate(
    daemon: PlayedDaemon, forwarder: Forwarder, keys: PlayedKeys, folder: Path
) -> None:
    forwarder.ask()
    request = daemon.request()
    second = Forwarder(folder, keys)
    second.ask()
    assert second.reason() == "duplicate"
    daemon.answer(request, GOOD)
    assert forwarder.reason() == "answered"
    third = Forwarder(folder, keys)
    third.ask()
    daemon.answer(daemon.request(), GOOD)
    assert third.reason() == "answered"


@pytest.mark.parametrize(
    ("who", "reason"),
    [(None, "requester-gone"), (Who(0x164, 0, 0, 101), "requester-gone"), (Who(0x164, ME + 1, 0, 1), "not-permitted")],
    ids=["gone", "reused", "set-user-id for another"],
)
def test_a_requesting_process_that_is_gone_or_not_permitted_is_refused(
    daemon: PlayedDaemon, forwarder: Forwarder, keys: PlayedKeys, who: Who | None, reason: str
) -> None:
    keys.who = who
    forwarder.ask()
    assert forwarder.reason() == reason
    assert daemon.silent()
    assert all(one.closed == 1 for one in keys.waiting)


def test_an_answer_is_dropped_if_the_requesting_process_ended_meanwhile(
    daemon: PlayedDaemon, forwarder: Forwarder, keys: PlayedKeys
) -> None:
    forwarder.ask()
    request = daemon.request()
    keys.waiting[0].lives = False
    daemon.answer(request, GOOD)
    assert forwarder.reason() == "requester-gone"


def test_a_malformed_forwarder_body_is_refused_as_bad_request(server: Server, folder: Path, keys: PlayedKeys) -> None:
    whole = pack_upcall(Upcall(KEY, AUTHORISATION, b"cifs.spnego;0;0;39010000;x", b""))
    for body in (b"", whole[:-1], whole + b"x", bytes(12)):
        forwarder = Forwarder(folder, keys)
        forwarder.ask(body=body)
        assert forwarder.reason() == "bad-request"


def test_a_forwarded_request_without_a_daemon_is_refused_and_counted(
    server: Server, forwarder: Forwarder, folder: Path
) -> None:
    forwarder.ask()
    assert forwarder.reason() == "no-daemon"
    assert counts(folder) == {"no-daemon": 1}


def test_the_forwarders_deadline_is_kept(folder: Path, keys: PlayedKeys) -> None:
    """Although the service would wait for an hour."""
    patient = {name: service._replace(patience=3600.0) for name, service in SERVICES.items()}
    with broker_below(None, folder, keys, patient), PlayedDaemon(folder) as daemon:
        forwarder = Forwarder(folder, keys)
        deadline_ns = forwarder.ask(timeout=0.5)
        left_for_the_key = 250_000_000  # ns, to instantiate it
        assert daemon.request().deadline_ns == pytest.approx(deadline_ns - left_for_the_key, abs=1000)
        assert forwarder.reason() == "timed-out"


def test_a_local_requester_cannot_ask_for_a_key_type(server: Server, folder: Path) -> None:
    with PlayedRequester(folder) as requester:
        requester.ask(b"", "cifs.spnego")
        assert requester.reason() == "no-service"


@pytest.mark.skipif(ME != 0, reason="only root can become somebody else")
def test_another_user_cannot_connect_to_the_forwarders_socket(server: Server, folder: Path, keys: PlayedKeys) -> None:
    def try_it() -> str:
        try:
            Forwarder(folder, keys)
        except PermissionError as error:
            return type(error).__name__
        return "connected"

    assert in_child(try_it, 65534) == "PermissionError"
    Place(folder).request_key_socket.chmod(0o666)
    assert in_child(lambda: len(Forwarder(folder, keys).socket.recv(9)), 65534) == 0  # closed at once


# --- starting a daemon -----------------------------------------------------------------------------------------


def starting(folder: Path, keys: PlayedKeys, *command: str) -> Iterator[Forwarder]:
    services = {**SERVICES, "cifs.spnego": SERVICES["cifs.spnego"]._replace(absent="start")}
    with broker_below(None, folder, keys, services, command):
        yield Forwarder(folder, keys)


def test_a_daemon_is_started_for_a_forwarded_request(folder: Path, keys: PlayedKeys) -> None:
    mark = folder.parent / "mark"
    for forwarder in starting(folder, keys, "sh", "-c", f"echo {{uid}} $HOME > {mark}"):
        forwarder.ask()
        until(lambda: mark.exists() and mark.read_text() == f"{ME}\n", "the command")
        with PlayedDaemon(folder) as daemon:
            daemon.answer(daemon.request(), GOOD)
            assert forwarder.reason() == "answered"


@pytest.mark.parametrize("command", [("false",), ("/nonexistent/command",)])
def test_a_failing_start_command_refuses_the_request_and_is_not_retried_at_once(
    folder: Path, keys: PlayedKeys, command: tuple[str, ...]
) -> None:
    for forwarder in starting(folder, keys, *command):
        forwarder.ask()
        assert forwarder.reason() == "no-daemon"
        again = Forwarder(folder, keys)
        again.ask()  # not tried again so soon
        assert again.reason() == "no-daemon"
        log = folder.parent / "broker.log"  # written after the answer
        until(lambda log=log: "daemon-start-failed" in log.read_text(), "the log")  # type: ignore[misc]
        assert log.read_text().count("daemon-start-failed") == 1


def test_a_start_without_a_registration_in_time_refuses_the_request(folder: Path, keys: PlayedKeys) -> None:
    for forwarder in starting(folder, keys, "true"):
        forwarder.ask(timeout=0.75)
        assert forwarder.reason() == "no-daemon"


# --- the real process --------------------------------------------------------------------------------------------


def test_a_real_process_is_described_and_its_end_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = real.Process(child.pid)
    assert process.who[:3] == (child.pid, ME, os.geteuid())
    assert real.started_at(os.getpid()) <= process.who.started
    assert process.lives
    child.communicate(b"\n")
    assert not process.lives
    process.close()
    with pytest.raises(ProcessLookupError):
        real.Process(child.pid)


def test_a_thread_id_resolves_to_its_process() -> None:
    code = "import threading; t = threading.Thread(target=input); t.start(); print(t.native_id, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        process = real.Process(int(child.stdout.readline()))
        assert process.who.pid == child.pid
        process.close()


@pytest.mark.parametrize("named", [True, False], ids=["by the description", "by /proc/keys"])
def test_a_daemons_own_upcall_is_refused_as_a_self_deadlock(folder: Path, keys: PlayedKeys, named: bool) -> None:
    """The process behind the key is the daemon's: here both are this one."""
    if named:
        keys.who = Who(os.getpid(), ME, ME, 1)
    else:
        keys.keys[KEY] = Described("dns_resolver", 0, 0, 0x39010000, b"db.test")
        keys.asker = os.getpid()
    owners = {"dns_resolver": ME}
    with broker_below(None, folder, keys, line_of=line_of, owners=owners) as server, PlayedDaemon(folder) as daemon:
        forwarder = Forwarder(folder, keys)
        forwarder.ask()
        assert forwarder.outcome() == Refusal("own-request", errno.EDEADLK)
        assert daemon.silent()
        until(lambda: "deadlock-refused" in (folder.parent / "broker.log").read_text(), "the log names it")
        keys.who, keys.asker = Who(os.getppid(), ME, ME, 1), os.getppid()
        forwarder = Forwarder(folder, keys)  # the first one's connection ended with its answer
        forwarder.ask()
        daemon.answer(daemon.request(), Refusal("locked", errno.EKEYREVOKED))
        assert forwarder.reason() == "locked"
        assert source_of(server, Forwarders).counts["own-request"] == 1
