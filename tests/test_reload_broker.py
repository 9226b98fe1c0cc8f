"""The broker reads its configuration again while it is at work: what is under way is answered as before."""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_broker_forwarders import GOOD, Forwarder, PlayedKeys
from upcall import config
from upcall.broker.server import Server
from upcall.broker.settings import BrokerSettings, Configured, configured
from upcall.config import ConfigError
from upcall.process.reload import Reloading
from upcall.process.settings import dumps
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs.packets import Ask, FileKey, pack_ask, pack_file_key
from upcall.protocols.request_key.key_types import OF_THE_SYSTEM
from upcall.protocols.request_key.source import Forwarders
from upcall.testing.gate import Gate
from upcall.testing.kernel import broker_below, source_of
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, StartDaemon, until

KEY = pack_file_key(FileKey(0, b"0123456789abcdef"))
GOOD_FILE = '[request-key."cifs.spnego"]\nwithout-daemon = "refuse"\n'


def wrap_of(signature: str) -> bytes:
    return pack_ask(Ask(0x42, signature, KEY))


# --- a process -------------------------------------------------------------------------------------------------


@pytest.fixture
def system(folder: Path) -> Path:
    file = folder.parent / "config.toml"
    file.write_text(GOOD_FILE)
    file.chmod(0o644)
    return file


@pytest.fixture
def broker(folder: Path, system: Path) -> Iterator[RunningBroker]:
    with RunningBroker(folder, system=system) as running:
        yield running


def test_no_request_is_lost_while_the_broker_reloads(
    broker: RunningBroker, start_daemon: StartDaemon, keyring: FolderKeyring, signature: str, gate: Gate, system: Path
) -> None:
    start_daemon(broker)
    slow = keyring.add("feedfeedfeedfeed", "bad", f"gate {gate.path}".encode())
    with PlayedRequester(broker.folder) as held, PlayedRequester(broker.folder) as requester:
        held.ask(wrap_of(slow))
        visitor = gate.arrived()
        for number in range(300):
            if number % 10 == 0:
                system.write_text(GOOD_FILE if number % 20 else "[request-key\n")
                broker.signal(signal.SIGHUP)
            requester.ask(wrap_of(signature))
            assert requester.reason() == "answered"
        visitor.release()
        assert held.reason() == "answered"
    broker.logged("reload-failed")
    assert f"{system}:1: " in broker.log
    assert broker.outcomes() == {"answered": 301}


def test_a_bad_file_is_logged_and_the_old_configuration_stays(broker: RunningBroker, system: Path) -> None:
    system.write_text(f"{GOOD_FILE}without_daemon = 1\n")
    broker.signal(signal.SIGHUP)
    broker.logged(f"{system}:3: request-key.")
    system.write_text(GOOD_FILE)
    broker.signal(signal.SIGHUP)
    broker.logged("configuration-reloaded")
    assert broker.process.poll() is None
    system.chmod(0o666)
    broker.signal(signal.SIGHUP)
    broker.logged("mode 0666 lets others write")
    broker.signal(signal.SIGTERM)
    assert broker.wait() == 0


def test_an_unknown_user_is_refused_by_file_and_line(folder: Path, system: Path) -> None:
    system.write_text('[request-key.dns_resolver]\nuser = "nobody-has-this-name"\n')
    with pytest.raises(Exception, match=f"{system}:2: request-key.dns_resolver.user: there is no user"):
        RunningBroker(folder, system=system)


def test_a_broker_whose_terminal_has_closed_ends_on_sighup(folder: Path) -> None:
    """As a process does that does not catch SIGHUP."""
    folder.mkdir(mode=0o755)
    pid, terminal = os.forkpty()
    if pid == 0:
        arguments = [sys.executable, "-m", "upcall.broker", dumps(BrokerSettings(folder))]
        os.execv(sys.executable, arguments)
    try:
        read_until(terminal, b" broker-ready ")
        os.kill(pid, signal.SIGHUP)  # the terminal is still there
        read_until(terminal, b" configuration-reloaded")
        os.close(terminal)
        until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, "its end")
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def read_until(terminal: int, words: bytes) -> None:
    told = b""
    while words not in told:
        assert select.select([terminal], [], [], PATIENCE)[0], told
        told += os.read(terminal, 1000)


# --- what changes ----------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> PlayedKeys:
    return PlayedKeys()


@pytest.fixture
def server(keys: PlayedKeys, folder: Path, system: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(config, "SYSTEM", system)
    read = functools.partial(configured, SERVICES)
    with broker_below(None, folder, keys, read=read) as running:
        yield running


def reload(server: Server) -> None:
    log = server.place.folder.parent / "broker.log"
    before = log.read_text().count("reloaded")
    server.reload()
    until(lambda: log.read_text().count("reloaded") > before, "it was read again")


def without_daemon(folder: Path, keys: PlayedKeys) -> str:
    forwarder = Forwarder(folder, keys)
    forwarder.ask()
    return forwarder.reason()


def test_a_reload_changes_the_treatment_of_requests_without_a_daemon(
    server: Server, folder: Path, keys: PlayedKeys, system: Path
) -> None:
    assert without_daemon(folder, keys) == "no-daemon"
    system.write_text(
        '[request-key."cifs.spnego"]\nwithout-daemon = "start"\n[daemon]\nstart = ["/nowhere/upcall-start"]\n'
    )
    reload(server)
    assert without_daemon(folder, keys) == "no-daemon"
    log = folder.parent / "broker.log"
    until(lambda: "daemon-start-failed" in log.read_text() and "/nowhere/upcall-start" in log.read_text(), "it tried")
    # Another command is not held to what the first has failed at a moment ago.
    system.write_text(f"{system.read_text().rpartition('start =')[0]}start = ['true', 'uid={{uid}}']\n")
    reload(server)
    forwarder = Forwarder(folder, keys)
    forwarder.ask()
    until(lambda: "daemon-starting" in log.read_text(), "the other command")
    system.write_text("")  # what is parked stays parked
    reload(server)
    with PlayedDaemon(folder) as daemon:
        daemon.answer(daemon.request(), GOOD)
        assert forwarder.reason() == "answered"
        with_daemon = Forwarder(folder, keys)
        with_daemon.ask()
        asked = daemon.request()
        system.write_text('[request-key."cifs.spnego"]\nwithout-daemon = "machine"\n')
        reload(server)
        daemon.answer(asked, GOOD)
        assert with_daemon.reason() == "answered"
    assert "reload-failed" not in log.read_text()


def test_a_reload_changes_whose_daemon_looks_names_up(server: Server, system: Path) -> None:
    system.write_text('[request-key.dns_resolver]\nuser = "daemon"\n')
    reload(server)
    assert source_of(server, Forwarders).owners["dns_resolver"] == 1
    system.write_text('[request-key.dns_resolver]\nuser = "nobody-has-this-name"\n')
    server.reload()
    log = server.place.folder.parent / "broker.log"
    until(lambda: f"{system}:2: request-key.dns_resolver.user: there is no user" in log.read_text(), "it says so")
    assert source_of(server, Forwarders).owners["dns_resolver"] == 1


def test_requests_are_answered_while_a_slow_reload_runs(
    folder: Path, keys: PlayedKeys, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "SYSTEM", system)
    go_on, reading = threading.Event(), threading.Event()

    def read() -> Configured:
        reading.set()
        assert go_on.wait(PATIENCE)
        return configured(SERVICES)

    with broker_below(None, folder, keys, read=read) as server:
        server.reload()
        assert reading.wait(PATIENCE)
        assert without_daemon(folder, keys) == "no-daemon"  # while it is being read
        go_on.set()
        until(lambda: "reloaded" in (folder.parent / "broker.log").read_text(), "it was read again")


# --- one at a time ---------------------------------------------------------------------------------------------


def test_reloads_asked_for_during_a_reload_are_run_as_one_more() -> None:
    steps: list[int] = []
    started, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def work() -> None:
        started.release()
        assert go_on.acquire(timeout=PATIENCE)
        steps.append(threading.get_ident())

    reloading = Reloading(work)
    reloading.ask()
    assert started.acquire(timeout=PATIENCE)
    for _ in range(5):
        reloading.ask()
    go_on.release()
    assert started.acquire(timeout=PATIENCE)
    go_on.release()
    until(lambda: len(steps) == 2, "twice")
    assert not started.acquire(blocking=False)
    reloading.ask()
    assert started.acquire(timeout=PATIENCE)
    go_on.release()
    until(lambda: len(steps) == 3, "and once more")


def test_two_reloads_never_run_at_once() -> None:
    """One is asked for in the moment in which the last one has found that no other is wanted, and not yet ended."""
    ended, asked, go_on = threading.Event(), threading.Event(), threading.Event()
    running, most = Counter[str](), [0]

    class SlowToEnd:
        """The lock; the first reload is held up where it has let go of it."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()
            if threading.current_thread().name == "reload" and not ended.is_set():
                ended.set()
                assert asked.wait(PATIENCE)

    def work() -> None:
        running["now"] += 1
        most[0] = max(most[0], running["now"])
        if ended.is_set():
            assert go_on.wait(PATIENCE)
        running["now"] -= 1

    reloading = Reloading(work)
    reloading._lock = SlowToEnd()  # type: ignore[assignment]
    reloading.ask()
    (first,) = [thread for thread in threading.enumerate() if thread.name == "reload"]
    assert ended.wait(PATIENCE)
    reloading.ask()
    until(lambda: running["now"] == 1, "the second has begun")
    asked.set()
    until(lambda: not first.is_alive() or most[0] == 2, "the first has ended, or begun anew")
    go_on.set()
    until(lambda: running["now"] == 0, "all have ended")
    assert most == [1]


def test_an_unexpected_error_does_not_stop_later_reloads(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: errors.append(found.exc_type))
    started, go_on, done = threading.Semaphore(0), threading.Semaphore(0), threading.Semaphore(0)
    outcomes = iter([ZeroDivisionError, None, None])

    def work() -> None:
        started.release()
        assert go_on.acquire(timeout=PATIENCE)
        if error := next(outcomes):
            raise error
        done.release()

    reloading = Reloading(work)
    reloading.ask()
    assert started.acquire(timeout=PATIENCE)
    reloading.ask()  # while the one that fails is at work
    go_on.release(3)
    assert done.acquire(timeout=PATIENCE), "the one asked for meanwhile"
    reloading.ask()
    assert done.acquire(timeout=PATIENCE), "and a later one"
    until(lambda: errors == [ZeroDivisionError], "threading.excepthook was called")  # after the next has started


def test_a_thread_that_cannot_start_does_not_stop_later_reloads(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    reloading = Reloading(done.set)

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError):
            reloading.ask()
    reloading.ask()
    assert done.wait(PATIENCE)


def test_the_broker_reads_services_owners_and_start_and_refuses_a_bad_file(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "SYSTEM", system)
    system.write_text('[request-key."cifs.spnego"]\nwithout-daemon = "machine"\n[daemon]\nstart = ["a"]\n')
    found = configured(SERVICES)
    assert found.services["cifs.spnego"].absent == "machine"
    assert found.services["dns_resolver"].absent == "refuse"
    assert (found.owners, found.start) == (dict.fromkeys(OF_THE_SYSTEM, 0), ("a",))
    system.write_text("?")
    with pytest.raises(ConfigError):
        configured(SERVICES)
