"""A real broker and real daemons over real sockets: who registers, who takes over, who dies, and what becomes of
requests meanwhile."""

from __future__ import annotations

import os
import signal
import time

import pytest

from upcall.broker.settings import BrokerSettings
from upcall.core.errors import Refused
from upcall.core.messages import Answer
from upcall.kernel.local import connect
from upcall.kernel.netlink import is_control
from upcall.process.paths import Place
from upcall.process.settings import dumps
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs.packets import Ask, FileKey, Reply, pack_ask, pack_file_key, pack_reply
from upcall.testing.gate import Gate
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import RunningBroker, RunningDaemon, StartDaemon, Started, until
from upcall.wire.envelope import HELO, QUIT, pack_control, refusal

KEY = b"0123456789abcdef"
FILE_KEY = pack_file_key(FileKey(0, KEY))
PLEASE = pack_ask(Ask(0x40, "0123456789abcdef", b"wrapped"))
GOOD = Answer(pack_reply(Reply(0x41, 0, FILE_KEY)))


def wrap_of(signature: str) -> bytes:
    return pack_ask(Ask(0x42, signature, FILE_KEY))


def works(broker: RunningBroker, signature: str) -> bool:
    with broker.client() as client:
        return client.unwrap(signature, client.wrap(signature, KEY)) == KEY


def busy_key(keyring: FolderKeyring, gate: Gate) -> str:
    return keyring.add("feedfeedfeedfeed", "bad", f"gate {gate.path}".encode())


# --- HELO, QUIT, replacement ---------------------------------------------------------------------------------


def test_one_request_all_the_way(broker: RunningBroker, daemon: RunningDaemon, signature: str) -> None:
    assert works(broker, signature)
    assert broker.outcomes() == {"answered": 2}
    found = broker.daemon()
    assert found is not None
    assert (found["pid"], found["answered"], found["pending"]) == (daemon.pid, 2, [])


def test_without_a_daemon(broker: RunningBroker, signature: str) -> None:
    with broker.client() as client, pytest.raises(Refused, match="no-daemon"):
        client.wrap(signature, KEY)


def test_the_daemon_may_be_there_before_the_broker(
    folder: object, start_daemon: StartDaemon, signature: str, request: pytest.FixtureRequest
) -> None:
    daemon = start_daemon()
    daemon.logged("broker-unavailable")
    broker: RunningBroker = request.getfixturevalue("broker")
    broker.registered(daemon.pid)
    assert works(broker, signature)


def test_a_newer_daemon_takes_over_and_nothing_is_lost(
    broker: RunningBroker, daemon: RunningDaemon, start_daemon: StartDaemon, keyring: FolderKeyring, gate: Gate
) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.ask(wrap_of(busy_key(keyring, gate)))
        gate.arrived()  # the first has it in hand
        second = start_daemon(broker)
        assert daemon.wait() == 0
        gate.arrived().release()  # the second was asked, too
        assert requester.reason() == "answered"
    assert broker.outcomes() == {"answered": 1}
    assert second.process.poll() is None


def test_a_takeover_and_an_answer_of_the_older_in_one_turn(broker: RunningBroker) -> None:
    """The broker wakes to find a HELO, and then what the replaced one has sent to a socket that is closed by now."""
    with PlayedDaemon(broker.folder) as first, PlayedRequester(broker.folder) as requester:
        requester.ask(PLEASE)
        held = first.request()
        second = PlayedDaemon(broker.folder, register=False)
        second.hello()
        second.link_taken()
        broker.stop()
        second.send(pack_control(HELO))
        first.answer(held, GOOD)
        broker.go_on()
        assert first.quit_heard()
        assert is_control(second.receive().data, HELO)
        second.answer(second.request(), GOOD)
        assert requester.reason() == "answered"
        second.close()


def test_sigterm_answers_what_it_holds_and_is_asked_no_more(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate
) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.ask(wrap_of(busy_key(keyring, gate)))
        held = gate.arrived()
        daemon.signal(signal.SIGTERM)
        until(lambda: (broker.daemon() or {}).get("leaving"), "leaving")
        requester.ask(wrap_of(busy_key(keyring, gate)))
        assert requester.reason() == "no-daemon"
        held.release()
        assert requester.reason() == "answered"
    assert daemon.wait() == 0
    assert broker.daemon() is None


def test_sigterm_of_an_idle_daemon_is_quick(broker: RunningBroker, daemon: RunningDaemon) -> None:
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 1
    assert "Traceback" not in daemon.log


def test_two_daemons_by_turns(broker: RunningBroker, start_daemon: StartDaemon, signature: str) -> None:
    for _ in range(3):
        start_daemon(broker)
        assert works(broker, signature)


def test_helo_again_changes_nothing(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        daemon.send(pack_control(HELO))
        requester.ask(PLEASE)
        daemon.answer(daemon.request(), GOOD)
        assert requester.reason() == "answered"


def test_a_process_that_registers_again_replaces_itself(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as first, PlayedDaemon(broker.folder) as second:
        assert first.quit_heard()
        assert first.disconnected()
        assert (broker.daemon() or {})["portid"] == second.socket.portid


def test_a_connection_that_ends_ends_the_registration(broker: RunningBroker) -> None:
    """The process lives, and keeps its ends of the link."""
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(PLEASE)
        held = daemon.request()
        requester.ask(PLEASE)
        assert daemon.connection is not None
        broker.stop()
        daemon.answer(held, GOOD)  # what it had answered before still counts
        daemon.connection.close()
        broker.go_on()
        assert [requester.reason(), requester.reason()] == ["answered", "daemon-gone"]
        assert broker.daemon() is None


def test_a_link_that_was_not_used_is_nobodys(broker: RunningBroker) -> None:
    """HELO on the connection alone registers nobody."""
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.hello()
        daemon.link_taken()
        assert broker.daemon() is None


@pytest.mark.parametrize("data", [b"x", bytes(16), pack_control(QUIT), pack_control(HELO) + b"x", bytes(70_000)])
def test_what_is_no_helo_ends_the_connection(broker: RunningBroker, data: bytes) -> None:
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.connection = connect(Place(broker.folder).registration_socket, frozenset({os.geteuid()}))
        daemon.connection.send(data)
        assert daemon.disconnected()
    assert broker.daemon() is None


def test_a_second_helo_on_the_connection_ends_it(broker: RunningBroker) -> None:
    """One link for each connection: descriptors are not given out by the dozen."""
    with PlayedDaemon(broker.folder) as daemon:
        assert daemon.connection is not None
        daemon.connection.send(pack_control(HELO))
        assert daemon.disconnected()
        until(lambda: broker.daemon() is None, "gone")


# --- daemons that die, stop, or hang -------------------------------------------------------------------------


def test_killed_with_a_request_in_hand(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate
) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.ask(wrap_of(busy_key(keyring, gate)))
        gate.arrived()
        began = time.monotonic()
        daemon.kill()
        assert requester.reason() == "daemon-gone"
        assert time.monotonic() - began < 1
        requester.ask(PLEASE)
        assert requester.reason() == "no-daemon"


def test_stopped_it_times_out_and_later_goes_on(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate, signature: str
) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.ask(wrap_of(busy_key(keyring, gate)), timeout=0.4)
        held = gate.arrived()
        daemon.stop()
        began = time.monotonic()
        requester.ask(wrap_of(signature), timeout=0.2)
        assert [requester.reason(), requester.reason()] == ["timed-out", "timed-out"]
        assert time.monotonic() - began < 1
        daemon.go_on()
        held.release()
    until(lambda: broker.status()["rejected"] == {"state": 1}, "the late answer is rejected")
    assert works(broker, signature)
    assert broker.outcomes() == {"timed-out": 2, "answered": 2}


def test_a_daemon_that_reads_nothing_is_full_at_last(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder), PlayedRequester(broker.folder) as requester:
        big = pack_ask(Ask(0x40, "0123456789abcdef", bytes(8000)))
        reasons = []
        for _ in range(70):  # each waits a moment, in the end 32 would be too many at once
            requester.ask(big, timeout=0.001)
            reasons.append(requester.reason())
        assert set(reasons) == {"timed-out", "daemon-full"}
        assert reasons[-1] == "daemon-full"


def test_more_at_once_than_there_are_contexts(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        for _ in range(33):
            requester.ask(PLEASE)
        assert requester.response()[::2] == (33, refusal("no-context"))
        for _ in range(32):
            daemon.answer(daemon.request(), GOOD)
        assert {requester.reason() for _ in range(32)} == {"answered"}
        found = broker.daemon()
        assert found is not None
        assert found["contexts"] == {"size": sum(one.contexts for one in SERVICES.values()), "in_use": 0, "most": 32}


# --- brokers that die ----------------------------------------------------------------------------------------


def test_a_broker_killed_and_started_again(broker: RunningBroker, daemon: RunningDaemon, signature: str) -> None:
    assert works(broker, signature)
    for _ in range(2):
        broker.kill()
        broker = RunningBroker(broker.folder)
        with broker:
            broker.registered(daemon.pid)
            assert works(broker, signature)


def test_a_broker_that_ends_refuses_what_it_owes(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(PLEASE)
        daemon.request()
        broker.signal(signal.SIGTERM)
        assert requester.reason() == "closing"
        assert broker.wait() == 0
        assert requester.closed()
    assert sorted(path.name for path in broker.folder.iterdir()) == []
    assert "Traceback" not in broker.log


def test_two_brokers_in_one_folder(broker: RunningBroker, signature: str, daemon: RunningDaemon) -> None:
    second = Started(
        ["-m", "upcall.broker", dumps(BrokerSettings(broker.folder))], broker.folder.parent / "second.log"
    )
    with second:
        assert second.wait() == 69
    assert "somebody listens there already" in second.log
    assert works(broker, signature)
