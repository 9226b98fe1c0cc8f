"""Real daemons with key modules that misbehave, and with a broker that is played."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from upcall.core.errors import REASONS, Refused
from upcall.core.messages import Answer, Refusal, Requester
from upcall.daemon.process import Daemon
from upcall.kernel.local import listen
from upcall.kernel.netlink import NetlinkSocket, give_pair, is_control
from upcall.process.log import EventLog
from upcall.process.paths import Place
from upcall.protocols.ecryptfs.packets import Ask, FileKey, pack_ask, pack_file_key
from upcall.testing.gate import Gate
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedBroker, PlayedRequester
from upcall.testing.processes import (
    ONLY_AGENT,
    PATIENCE,
    RunningBroker,
    RunningDaemon,
    StartDaemon,
    in_child,
    until,
)
from upcall.wire.envelope import (
    HELO,
    QUIT,
    REQUEST,
    Envelope,
    NetlinkMessage,
    Response,
    pack_control,
    pack_message,
    pack_request,
    pack_response,
    refusal,
)

KEY = b"0123456789abcdef"
FILE_KEY = pack_file_key(FileKey(0, KEY))
BAD = "feedfeedfeedfeed"
NOBODY = 65534
SECRET = "correct-horse-battery-staple"  # in exceptions of tests/misbehaving.py
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def wrap_of(signature: str) -> bytes:
    return pack_ask(Ask(0x42, signature, FILE_KEY))


# --- key modules that misbehave ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("raise", "module-broke"),
        ("exit", "module-broke"),
        ("interrupt", "module-broke"),
        ("open_raises", "module-broke"),
        ("none", "module-broke"),
        ("text", "module-broke"),
        ("empty", "module-broke"),
        ("short", "module-broke"),
        ("long", "module-broke"),
        ("huge", "module-broke"),
        ("unwrap_none", "module-broke"),
        ("unwrap_other", "module-broke"),
        ("same", "module-failed"),
        ("clear", "module-failed"),
        ("garbage", "module-failed"),
        ("fail", "module-failed"),
        ("refuse", "locked"),
    ],
)
def test_a_module_that_misbehaves_is_refused_and_the_daemon_lives(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, signature: str, verb: str, reason: str
) -> None:
    keyring.add(BAD, "bad", verb.encode())
    with broker.client() as client:
        for _ in range(4):  # more often than there are workers at the socket
            with pytest.raises(Refused) as caught:
                client.wrap(BAD, KEY)
            assert caught.value.reason == reason
        assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
    assert SECRET not in daemon.log


@pytest.mark.parametrize("verb", ["raise", "exit", "fail"])
def test_only_a_daemon_for_authors_prints_the_traceback_of_a_modules_exception(
    broker: RunningBroker, keyring: FolderKeyring, folder: Path, verb: str
) -> None:
    keyring.add(BAD, "bad", verb.encode())
    settings = ONLY_AGENT._replace(traceback=True)
    here, keys = Path(__file__).parent, folder.parent / "keys"
    with RunningDaemon(folder, keys, {"bad": "misbehaving:BAD"}, [here], settings=settings) as daemon:
        broker.registered(daemon.pid)
        with broker.client() as client, pytest.raises(Refused):
            client.wrap(BAD, KEY)
        assert ("Traceback (most recent call last)" in daemon.log) is (verb != "fail"), "what a module says is logged"
        assert ("misbehaving.py" in daemon.log) is (verb != "fail")


def test_a_module_that_fails_after_its_trial_is_refused(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring
) -> None:
    keyring.add(BAD, "bad", b"later")
    with broker.client() as client:
        assert client.unwrap(BAD, client.wrap(BAD, KEY)) == KEY
        with pytest.raises(Refused, match="module-failed"):
            client.wrap(BAD, KEY)


def test_a_module_that_returns_the_key_in_clear_later_is_refused_by_the_broker(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring
) -> None:
    """The daemon has tried a key of this size already; the broker checks every answer."""
    keyring.add(BAD, "bad", b"clear_later")
    with broker.client() as client:
        client.wrap(BAD, KEY)
        with pytest.raises(Refused, match="bad-answer"):
            client.wrap(BAD, KEY)


def test_a_key_whose_staleness_check_raises_is_refused(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring
) -> None:
    keyring.add(BAD, "bad", b"stale_raises")
    with broker.client() as client:
        client.wrap(BAD, KEY)
        with pytest.raises(Refused, match="module-broke"):
            client.wrap(BAD, KEY)
    assert SECRET not in daemon.log


def test_a_key_that_hangs_does_not_delay_other_keys(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate, signature: str
) -> None:
    keyring.add(BAD, "bad", f"gate {gate.path}".encode())
    with PlayedRequester(broker.folder) as requester, broker.client() as client:
        for _ in range(20):
            requester.ask(wrap_of(BAD))
        held = gate.arrived()
        assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
        held.release()
        for _ in range(19):
            gate.arrived().release()
        assert {requester.reason() for _ in range(20)} == {"answered"}


def test_a_key_whose_jobs_are_all_overdue_refuses_as_busy(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate, signature: str
) -> None:
    keyring.add(BAD, "bad", f"gate {gate.path}".encode())
    with PlayedRequester(broker.folder) as requester:
        for _ in range(8):  # more than a lane holds
            requester.ask(wrap_of(BAD), timeout=0.2)
        held = gate.arrived()
        assert {requester.reason() for _ in range(8)} == {"timed-out"}
        requester.ask(wrap_of(BAD))
        assert requester.reason() == "busy"
        requester.ask(wrap_of(signature))
        assert requester.reason() == "answered"
        held.release()
        requester.ask(wrap_of(BAD))
        gate.arrived().release()


@pytest.mark.parametrize("size", [0, 1, 3, 68, 200, 8000])
def test_a_malformed_file_key_is_refused_before_it_reaches_a_module(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, size: int
) -> None:
    """Modules are promised 1 to 67 bytes; a malformed file key could not be unwrapped again."""
    keyring.add(BAD, "bad", b"raise")
    with PlayedRequester(broker.folder) as requester:
        requester.ask(pack_ask(Ask(0x42, BAD, bytes(size))))
        assert requester.reason() == "bad-request"


def test_an_unknown_key_or_module_is_refused(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring
) -> None:
    keyring.add(BAD, "moon", b"")
    with broker.client() as client:
        with pytest.raises(Refused, match="no-key"):
            client.wrap("0" * 16, KEY)
        with pytest.raises(Refused, match="no-module"):
            client.wrap(BAD, KEY)


def test_data_that_this_key_did_not_wrap_is_refused(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    with broker.client() as client, pytest.raises(Refused, match="module-failed"):
        client.unwrap(signature, bytes(100))


# --- a played broker -----------------------------------------------------------------------------------------


def refused(response: Response) -> tuple[int, str]:
    assert isinstance(response.outcome, Refusal)
    return response.seq, response.outcome.reason


def test_malformed_requests_of_a_broker_are_refused_and_junk_is_dropped(
    folder: Path, start_daemon: StartDaemon, signature: str
) -> None:
    broker = PlayedBroker(folder)
    daemon = start_daemon()
    broker.register()
    broker.ask(1, b"nonsense")
    assert refused(broker.response()) == (1, "bad-request")
    broker.ask(2, wrap_of(signature), "moon")
    assert refused(broker.response()) == (2, "no-service")
    broken = bytearray(pack_request(Envelope(3, 3, "key", Requester(0, 0), 1, b"")))
    broken[24] = 99  # the version: what follows cannot be understood, but an answer is owed
    broker.socket.send(bytes(broken))
    assert refused(broker.response()) == (3, "bad-request")
    for junk in (b"x", bytes(16), pack_control(99), pack_message(NetlinkMessage(REQUEST, 0, 0, b""))[:20]):
        broker.socket.send(junk)
    broker.ask(4, wrap_of(signature))
    response = broker.response()
    assert (response.seq, type(response.outcome)) == (4, Answer)
    assert daemon.process.poll() is None


@pytest.mark.parametrize(
    "how",
    [b"lane", b"lane of a wrong type", b"kind", b"kind of a wrong type", b"none", b"text", b"huge", b"raise"],
)
def test_a_handler_that_misbehaves_is_refused_and_the_daemon_lives(
    folder: Path, start_daemon: StartDaemon, how: bytes
) -> None:
    broker = PlayedBroker(folder)
    daemon = start_daemon(handlers=["misbehaving:HANDLER"])
    broker.register()
    for seq in range(40):  # more often than there can be workers
        broker.ask(seq, how, "bad")
        assert refused(broker.response()) == (seq, "module-broke")
    broker.ask(99, b"good", "bad")
    assert broker.response().outcome == Answer(b"it")
    assert SECRET not in daemon.log


def test_a_request_past_its_deadline_is_dropped(folder: Path, start_daemon: StartDaemon, signature: str) -> None:
    broker = PlayedBroker(folder)
    start_daemon()
    broker.register()
    broker.ask(1, wrap_of(signature), timeout=-1)
    broker.ask(2, wrap_of(signature))
    assert broker.response().seq == 2


def test_other_sockets_cannot_send_to_a_registered_daemons_link(
    folder: Path, start_daemon: StartDaemon, signature: str
) -> None:
    broker = PlayedBroker(folder)
    start_daemon()
    broker.register()
    broker.ask(1, wrap_of(signature))
    assert broker.response().seq == 1
    with pytest.raises(ConnectionRefusedError):
        NetlinkSocket().send_to(pack_control(QUIT), broker.portid)


@root_only
def test_a_registration_socket_of_another_user_is_not_trusted(
    folder: Path, start_daemon: StartDaemon, signature: str
) -> None:
    """The path is right, the uid is not: nothing is sent there."""
    folder.mkdir()
    path = Place(folder).registration_socket
    os.chown(folder, NOBODY, NOBODY)
    folder.parent.chmod(0o755)

    def squat() -> str:
        os.chdir(folder)
        with listen(Path(path.name), 0o666) as listener:
            listener.settimeout(PATIENCE)
            os.write(ready[1], b"x")
            connection, _ = listener.accept()
            connection.settimeout(PATIENCE)
            return repr(connection.recv(64))

    ready = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        squatter = pool.submit(in_child, squat, uid=NOBODY)
        os.read(ready[0], 1)
        daemon = start_daemon()
        daemon.logged(f"uid {NOBODY} listens there")
        assert squatter.result() == "b''"
    for end in ready:
        os.close(end)
    path.unlink()
    os.chown(folder, 0, 0)
    with RunningBroker(folder) as broker:
        broker.registered(daemon.pid)


def _give(*fds: int) -> Callable[[socket.socket], object]:
    return lambda connection: socket.send_fds(connection, [pack_control(HELO)], fds or [connection.fileno()] * 2)


def _strangers(connection: socket.socket) -> None:
    ends = NetlinkSocket(), NetlinkSocket()
    give_pair(connection, pack_control(HELO), *ends)
    for end in ends:
        end.close()


def _one(connection: socket.socket) -> None:
    end = NetlinkSocket()
    _give(end.fileno())(connection)
    end.close()


NONSENSE: dict[str, Callable[[socket.socket], object]] = {
    "nothing": lambda connection: None,
    "no link": lambda connection: connection.send(pack_control(HELO)),
    "junk": lambda connection: connection.send(b"x" * 40),
    "files": _give(0, 0),
    "a dozen files": _give(*[0] * 12),
    "one socket": _one,
    "two that are not connected": _strangers,
    "another family": _give(),
}


def _open_files(pid: int) -> list[str]:
    """What the descriptors of a process are, without the numbers by which two of a kind differ."""
    return sorted(re.sub(r":\[\d+\]", "", str(path.readlink())) for path in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("what", NONSENSE)
def test_a_broker_that_gives_no_valid_link_is_logged_and_retried(
    folder: Path, start_daemon: StartDaemon, signature: str, what: str
) -> None:
    """The daemon keeps no descriptor of the failed try."""
    played = PlayedBroker(folder)
    daemon = start_daemon()
    descriptors = []
    for nonsense in (NONSENSE["nothing"], NONSENSE[what]):
        connection, _ = played.listener.accept()
        assert is_control(connection.recv(64), HELO)
        descriptors.append(_open_files(daemon.pid))
        nonsense(connection)
        connection.close()
    daemon.logged("broker-unavailable")
    connection, _ = played.listener.accept()
    assert is_control(connection.recv(64), HELO)
    assert _open_files(daemon.pid) == descriptors[-1]
    connection.close()
    played.register()
    played.ask(1, wrap_of(signature))
    assert played.response().seq == 1


def test_a_broker_that_refuses_is_asked_again(folder: Path, start_daemon: StartDaemon) -> None:
    played = PlayedBroker(folder)
    daemon = start_daemon()
    connection, _ = played.listener.accept()
    assert is_control(connection.recv(64), HELO)
    connection.send(pack_response(0, 0, refusal("no-context")))
    connection.close()
    daemon.logged("it refuses: no-context")
    played.register()
    daemon.logged("daemon-registered")


class Unavailable(EventLog):
    """A log that counts how often no broker could be reached."""

    def __init__(self) -> None:
        super().__init__("daemon")
        self.times = 0

    def __call__(self, event: str, /, **fields: object) -> None:
        self.times += event == "broker-unavailable"


def test_a_daemon_looks_for_its_broker_again_until_it_is_registered_once(tmp_path: Path) -> None:
    """`upcall broker & upcall daemon &`: the daemon may be first. Later it stays with its broker."""
    system, own, log = Place(tmp_path / "system"), Place(tmp_path / "own"), Unavailable()
    daemon = Daemon(system, [], log=log, find=lambda: own if own.registration_socket.exists() else system)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        until(lambda: log.times or None, "the first try")
        assert daemon.place == system
        played = PlayedBroker(own.folder)
        played.register()
        assert daemon.place == own
        own.registration_socket.unlink()
        for end in (played.listener, played.connection, played.socket, played.far):
            end.close()
        until(lambda: log.times > 1 or None, "another try")
        assert daemon.place == own
    finally:
        daemon.stop()
        daemon.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_daemon_closes_the_links_of_brokers_that_have_ended(
    folder: Path, start_daemon: StartDaemon, signature: str
) -> None:
    """Every worker gives up its link, even one that blocks in it."""
    daemon = start_daemon()
    counts = []
    for _ in range(8):
        played = PlayedBroker(folder)
        played.register()
        played.ask(1, wrap_of(signature))
        assert played.response().seq == 1
        ends = played.socket.portid, played.far.portid
        counts.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
        played.close()
        until(lambda ends=ends: all(map(_free, ends)), "the daemon has closed both")  # type: ignore[misc]
    assert counts[-1] == counts[1]


def _free(portid: int) -> bool:
    try:
        NetlinkSocket(portid).close()
    except OSError:
        return False
    return True


def test_a_full_link_is_closed_when_its_broker_ends(folder: Path, start_daemon: StartDaemon, signature: str) -> None:
    played = PlayedBroker(folder)
    daemon = start_daemon()
    played.register()
    daemon.logged("daemon-registered")
    daemon.stop()
    envelope = Envelope(1, 1, "key", Requester(0, 0), 1, bytes(60_000))
    while played.socket.send(pack_request(envelope)):
        pass
    ends = played.socket.portid, played.far.portid
    played.close()
    daemon.go_on()
    until(lambda: all(map(_free, ends)), "the daemon has closed both")
    with RunningBroker(folder) as broker:
        broker.registered(daemon.pid)


def test_a_daemon_replaced_just_before_its_broker_ended_exits(folder: Path, start_daemon: StartDaemon) -> None:
    """QUIT takes precedence over the connection's end: otherwise the daemon would replace its successor."""
    played = PlayedBroker(folder)
    daemon = start_daemon()
    played.register()
    daemon.logged("daemon-registered")
    daemon.stop()
    played.quit()
    played.close()
    daemon.go_on()
    assert daemon.wait() == 0
    assert "replaced" in daemon.log


def test_a_requester_of_another_uid_is_refused_whatever_the_broker_says(
    folder: Path, start_daemon: StartDaemon, signature: str
) -> None:
    played = PlayedBroker(folder)
    start_daemon()
    played.register()
    for seq, (service, uid) in enumerate([("key", 1), ("ecryptfs", 4711), ("key", 0xFFFFFFFF)]):
        deadline = int((time.monotonic() + PATIENCE) * 1e9)
        played.socket.send(pack_request(Envelope(seq, seq, service, Requester(uid, 0), deadline, wrap_of(signature))))
        assert refused(played.response()) == (seq, "not-permitted")
    for seq, uid in enumerate([0, os.getuid()]):
        deadline = int((time.monotonic() + PATIENCE) * 1e9)
        played.socket.send(pack_request(Envelope(seq, seq, "key", Requester(uid, 0), deadline, wrap_of(signature))))
        assert isinstance(played.response().outcome, Answer)


def test_a_daemon_tells_only_its_own_user_why_whatever_the_broker_says(
    folder: Path, start_daemon: StartDaemon, keyring: FolderKeyring
) -> None:
    keyring.add("badbadbadbadbadb", "moon", b"")
    played = PlayedBroker(folder)
    start_daemon()
    played.register()
    deadline, body = int((time.monotonic() + PATIENCE) * 1e9), wrap_of("badbadbadbadbadb")
    for uid, wants in ((os.getuid(), False), (os.getuid(), True), (4711, True)):
        played.socket.send(pack_request(Envelope(1, 1, "key", Requester(uid, 0), deadline, body, wants)))
        outcome = played.response().outcome
        assert isinstance(outcome, Refusal)
        assert bool(outcome.why) == (wants and uid == os.getuid())
    played.socket.send(pack_request(Envelope(1, 1, "ecryptfs", Requester(os.getuid(), 0), deadline, body)))
    assert played.response().outcome == Refusal("no-module", REASONS["no-module"])


def test_sigterm_ends_a_daemon_that_waits_for_a_broker(folder: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    daemon.logged("broker-unavailable")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_a_daemon_exits_after_sigterm_although_the_broker_never_sends_quit(
    folder: Path, start_daemon: StartDaemon
) -> None:
    broker = PlayedBroker(folder)
    daemon = start_daemon()
    broker.register()
    daemon.logged("daemon-registered")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "quit-unanswered" in daemon.log, "it has waited for one"
