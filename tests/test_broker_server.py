"""A real broker and real daemons over real sockets: registration, take-over, death, and the outcome of
requests meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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


def test_sequence_numbers_of_a_broker_do_not_go_on_from_those_of_an_earlier_one(tmp_path: Path) -> None:
    """A reply to an earlier broker's request would match otherwise."""
    numbers = set()
    for name in ("1", "2", "3"):
        with (
            RunningBroker(tmp_path / name) as broker,
            PlayedDaemon(broker.folder) as daemon,
            PlayedRequester(broker.folder) as requester,
        ):
            requester.ask(PLEASE)
            numbers.add(daemon.request().seq)
    assert len(numbers) == 3


# --- HELO, QUIT, replacement ---------------------------------------------------------------------------------


def test_a_real_daemon_answers_a_request_and_is_counted(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    assert works(broker, signature)
    assert broker.outcomes() == {"answered": 2}
    found = broker.daemon()
    assert found is not None
    assert (found["pid"], found["answered"], found["pending"]) == (daemon.pid, 2, [])


def test_a_request_without_a_daemon_is_refused(broker: RunningBroker, signature: str) -> None:
    with broker.client() as client, pytest.raises(Refused, match="no-daemon"):
        client.wrap(signature, KEY)


def test_a_daemon_started_before_the_broker_registers_when_it_appears(
    folder: object, start_daemon: StartDaemon, signature: str, request: pytest.FixtureRequest
) -> None:
    daemon = start_daemon()
    daemon.logged("broker-unavailable")
    broker: RunningBroker = request.getfixturevalue("broker")
    broker.registered(daemon.pid)
    assert works(broker, signature)


def test_a_newer_daemon_takes_over_a_pending_request_and_the_older_one_ends(
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


def test_a_take_over_and_the_older_daemons_answer_in_one_turn_settle_once(broker: RunningBroker) -> None:
    """The broker wakes to a HELO, and then an answer of the replaced daemon to a socket that is closed by now."""
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


def test_a_daemon_answers_pending_requests_after_sigterm_but_gets_no_new_ones(
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


def test_an_idle_daemon_ends_at_once_on_sigterm(broker: RunningBroker, daemon: RunningDaemon) -> None:
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "quit-unanswered" not in daemon.log, "it has not waited for a time-out"
    assert "Traceback" not in daemon.log


def test_requests_are_answered_after_each_of_several_take_overs(
    broker: RunningBroker, start_daemon: StartDaemon, signature: str
) -> None:
    for _ in range(3):
        start_daemon(broker)
        assert works(broker, signature)


def test_a_repeated_helo_on_the_link_changes_nothing(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        daemon.send(pack_control(HELO))
        requester.ask(PLEASE)
        daemon.answer(daemon.request(), GOOD)
        assert requester.reason() == "answered"


def test_a_process_that_registers_again_replaces_its_own_registration(broker: RunningBroker) -> None:
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


def test_a_link_without_a_helo_of_its_own_registers_no_daemon(broker: RunningBroker) -> None:
    """HELO on the connection alone does not register."""
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.hello()
        daemon.link_taken()
        assert broker.daemon() is None


@pytest.mark.parametrize(
    "data",
    [b"x", bytes(16), pack_control(QUIT), pack_control(HELO) + b"x", bytes(70_000)],
    ids=["a byte", "zeros", "QUIT", "HELO and more", "too long"],
)
def test_anything_but_a_helo_ends_the_registration_connection(broker: RunningBroker, data: bytes) -> None:
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.connection = connect(Place(broker.folder).registration_socket, frozenset({os.geteuid()}))
        daemon.connection.send(data)
        assert daemon.disconnected()
    assert broker.daemon() is None


def test_a_second_helo_on_the_connection_ends_it(broker: RunningBroker) -> None:
    """One link for each connection limits the descriptors that a process can obtain."""
    with PlayedDaemon(broker.folder) as daemon:
        assert daemon.connection is not None
        daemon.connection.send(pack_control(HELO))
        assert daemon.disconnected()
        until(lambda: broker.daemon() is None, "gone")


# --- daemons that die, stop, or hang -------------------------------------------------------------------------


def test_a_daemon_killed_with_a_request_in_hand_has_it_refused_at_once(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate
) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.ask(wrap_of(busy_key(keyring, gate)))
        gate.arrived()
        daemon.kill()
        assert requester.reason() == "daemon-gone"  # at its deadline it would be "timed-out"
        requester.ask(PLEASE)
        assert requester.reason() == "no-daemon"


def test_requests_to_a_stopped_daemon_time_out_and_it_works_again_later(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, gate: Gate, signature: str
) -> None:
    with PlayedRequester(broker.folder) as requester:
        patient = requester.ask(wrap_of(busy_key(keyring, gate)), timeout=4.0)
        held = gate.arrived()
        daemon.stop()
        hasty = requester.ask(wrap_of(signature), timeout=0.2)
        timed_out = refusal("timed-out")
        responses = [requester.response(), requester.response()]
        assert [(one.seq, one.outcome) for one in responses] == [(hasty, timed_out), (patient, timed_out)]
        daemon.go_on()
        held.release()
    until(lambda: broker.status()["rejected"] == {"state": 1}, "the late answer is rejected")
    assert works(broker, signature)
    assert broker.outcomes() == {"timed-out": 2, "answered": 2}


def test_requests_to_a_daemon_that_never_reads_are_refused_once_its_link_is_full(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder), PlayedRequester(broker.folder) as requester:
        big = pack_ask(Ask(0x40, "0123456789abcdef", bytes(8000)))
        reasons = []
        for _ in range(70):  # each waits a moment, in the end 32 would be too many at once
            requester.ask(big, timeout=0.001)
            reasons.append(requester.reason())
        assert set(reasons) == {"timed-out", "daemon-full"}
        assert reasons[-1] == "daemon-full"


def test_requests_beyond_the_number_of_contexts_are_refused(broker: RunningBroker) -> None:
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


def test_a_daemon_registers_again_after_the_broker_was_killed_and_restarted(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    assert works(broker, signature)
    for _ in range(2):
        broker.kill()
        broker = RunningBroker(broker.folder)
        with broker:
            broker.registered(daemon.pid)
            assert works(broker, signature)


def test_a_broker_that_ends_refuses_pending_requests_and_leaves_no_files(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(PLEASE)
        daemon.request()
        broker.signal(signal.SIGTERM)
        assert requester.reason() == "closing"
        assert broker.wait() == 0
        assert requester.closed()
    assert sorted(path.name for path in broker.folder.iterdir()) == []
    assert "Traceback" not in broker.log


def test_a_second_broker_in_one_folder_exits_and_the_first_keeps_working(
    broker: RunningBroker, signature: str, daemon: RunningDaemon
) -> None:
    second = Started(
        ["-m", "upcall.broker", dumps(BrokerSettings(broker.folder))], broker.folder.parent / "second.log"
    )
    with second:
        assert second.wait() == 69
    assert "another process listens there already" in second.log
    assert works(broker, signature)
