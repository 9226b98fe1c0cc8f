"""The broker's local socket: which requests are permitted, and requesters that misbehave."""

from __future__ import annotations

import os
import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from upcall.client import NoBroker
from upcall.core.errors import Refused
from upcall.core.messages import Answer, Refusal, Requester
from upcall.protocols.ecryptfs.packets import Ask, FileKey, Reply, pack_ask, pack_file_key, pack_reply
from upcall.protocols.local.source import Requesters
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import RunningBroker, in_child, until
from upcall.wire.envelope import (
    MAX_BODY,
    MAX_MESSAGE,
    REQUEST,
    Envelope,
    NetlinkMessage,
    pack_control,
    pack_message,
    pack_request,
)

FILE_KEY = pack_file_key(FileKey(0, b"0123456789abcdef"))
PLEASE = pack_ask(Ask(0x40, "0123456789abcdef", b"wrapped"))
GOOD = Answer(pack_reply(Reply(0x41, 0, FILE_KEY)))
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def still_serves(broker: RunningBroker) -> None:
    assert broker.status()["broker"]["pid"] == broker.pid


def test_answers_carry_the_requesters_own_sequence_and_index(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        sent = [requester.ask(PLEASE) for _ in range(5)]
        asked = [daemon.request() for _ in range(5)]
        for request in reversed(asked):
            daemon.answer(request, GOOD)
        got = [requester.response() for _ in range(5)]
    assert [one.seq for one in got] == sent[::-1]
    assert [one.index for one in got] == [seq * 3 for seq in sent[::-1]]


def test_a_requester_of_the_same_uid_is_told_why_if_it_wants(broker: RunningBroker) -> None:
    locked = Refusal("locked", 128, "locked since 10:04 (upcall lock)")
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        for wants in (True, False):
            requester.ask(PLEASE, wants_why=wants)
            request = daemon.request()
            assert request.wants_why is wants
            daemon.answer(request, locked)
            assert requester.response().outcome == (locked if wants else locked._replace(why=""))


def test_two_requesters_with_equal_numbers_each_get_their_own_answer(broker: RunningBroker) -> None:
    with (
        PlayedDaemon(broker.folder) as daemon,
        PlayedRequester(broker.folder) as one,
        PlayedRequester(broker.folder) as two,
    ):
        one.ask(PLEASE)
        first = daemon.request()
        two.ask(PLEASE)
        second = daemon.request()
        assert first.requester == second.requester == Requester(os.getuid(), os.getpid())
        daemon.answer(second, GOOD)
        assert two.reason() == "answered"
        daemon.answer(first, GOOD)
        assert one.reason() == "answered"


@pytest.mark.parametrize(
    ("service", "body", "reason"),
    [
        ("key", b"", "bad-request"),
        ("key", b"\x40\x10", "bad-request"),
        ("key", PLEASE + b"x", "bad-request"),
        ("key", b"\x99" + PLEASE[1:], "bad-request"),
        ("key", bytes(MAX_BODY), "bad-request"),
        ("ecryptfs", PLEASE, "no-service"),
        ("moon", PLEASE, "no-service"),
        ("moon\0", PLEASE, "no-service"),
        ("daemon.status", b"", "no-service"),
    ],
    ids=[
        "empty",
        "cut short",
        "a byte too many",
        "unknown tag",
        "too long",
        "service of the kernel",
        "unknown service",
        "NUL in the service",
        "service of the daemon",
    ],
)
def test_an_invalid_request_is_refused_without_asking_a_daemon(
    broker: RunningBroker, service: str, body: bytes, reason: str
) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(body, service)
        assert requester.reason() == reason
        assert daemon.silent()


@pytest.mark.parametrize("at", [0, 4, 20, 24, 25], ids=["nlmsg_len", "type", "data_len", "version", "name_len"])
def test_a_malformed_request_is_refused_under_its_sequence_number(broker: RunningBroker, at: int) -> None:
    data = bytearray(pack_request(Envelope(5, 6, "key", Requester(os.getuid(), 0), 0, PLEASE)))
    data[at] ^= 0x80
    with PlayedRequester(broker.folder) as requester:
        requester.send(bytes(data))
        response = requester.response()
        assert (response.seq, response.index) == (5, 6)
        assert "bad-request" in repr(response)


@pytest.mark.parametrize("data", [b"x", bytes(23), pack_control(REQUEST)], ids=["a byte", "23", "header"])
def test_a_datagram_without_a_sequence_number_ends_the_connection(broker: RunningBroker, data: bytes) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.send(data)
        assert requester.closed()
    still_serves(broker)


def test_a_datagram_longer_than_the_protocol_allows_ends_the_connection(broker: RunningBroker) -> None:
    with PlayedRequester(broker.folder) as requester:
        requester.send(bytes(MAX_MESSAGE + 1))
        assert requester.closed()
    still_serves(broker)


def test_unexpected_file_descriptors_are_refused_and_not_kept(broker: RunningBroker) -> None:
    before = len(os.listdir(f"/proc/{broker.pid}/fd")) if os.geteuid() == 0 else 0
    with PlayedRequester(broker.folder) as requester:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", 0))]
        try:
            requester.socket.sendmsg([pack_message(NetlinkMessage(REQUEST, 1, 0, b""))], rights)
        except PermissionError:  # Linux 6.16: the kernel takes none for us
            requester.ask(b"", "broker.status")
            assert requester.reason() == "answered"
        else:
            assert requester.socket.recv(1) == b""
            until(lambda: "descriptors-refused" in broker.log or None, "it says so")
        after = len(os.listdir(f"/proc/{broker.pid}/fd")) if os.geteuid() == 0 else 0
        assert after <= before + 1  # the connection itself


def test_answers_to_a_requester_that_has_gone_are_dropped_and_others_served(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon:
        requester = PlayedRequester(broker.folder)
        requester.ask(PLEASE)
        requester.ask(PLEASE)
        first, second = daemon.request(), daemon.request()
        requester.close()
        daemon.answer(first, GOOD)
        daemon.answer(second, GOOD)
        broker.pending(0)
        with PlayedRequester(broker.folder) as another:
            another.ask(PLEASE)
            daemon.answer(daemon.request(), GOOD)
            assert another.reason() == "answered"


def test_a_requester_that_never_reads_loses_its_connection(broker: RunningBroker) -> None:
    """Its answers pile up until its socket is full; then its connection is closed. Others stay connected."""
    with PlayedRequester(broker.folder) as deaf, PlayedRequester(broker.folder) as other:

        def gone() -> bool:
            try:
                deaf.ask(b"", "broker.status")
            except OSError:
                return True
            return False

        until(gone, "the connection is taken away")
        other.ask(b"", "broker.status")
        assert other.reason() == "answered"


@root_only
def test_a_request_to_another_uids_daemon_is_not_permitted_except_for_root(broker: RunningBroker) -> None:
    def ask(uid: int) -> str:
        with PlayedRequester(broker.folder) as requester:
            requester.ask(PLEASE, uid=uid)
            return requester.reason()

    with PlayedDaemon(broker.folder):
        assert in_child(lambda: ask(0), uid=NOBODY) == "not-permitted"
        assert in_child(lambda: ask(NOBODY), uid=NOBODY) == "no-daemon"
        assert ask(NOBODY) == "no-daemon"  # root may ask for anybody


@root_only
def test_root_may_ask_another_uids_daemon_which_sees_the_requester(broker: RunningBroker) -> None:
    """The envelope carries root's uid and pid."""
    ready, done = os.pipe(), os.pipe()

    def serve() -> list[int]:
        with PlayedDaemon(broker.folder) as daemon:
            os.write(ready[1], b"x")
            request = daemon.request()
            daemon.answer(request, GOOD)
            os.read(done[0], 1)
            return list(request.requester)

    def ask() -> str:
        os.read(ready[0], 1)
        with PlayedRequester(broker.folder) as requester:
            requester.ask(PLEASE, uid=NOBODY)
            reason = requester.reason()
        os.write(done[1], b"x")
        return reason

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if ask() == "answered" else 1
        finally:
            os._exit(status)
    assert in_child(serve, uid=NOBODY) == [0, pid]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*ready, *done):
        os.close(end)


@root_only
def test_root_is_not_told_why_another_uids_daemon_refuses(broker: RunningBroker) -> None:
    ready, done = os.pipe(), os.pipe()

    def serve() -> bool:
        with PlayedDaemon(broker.folder) as daemon:
            os.write(ready[1], b"x")
            request = daemon.request()
            daemon.answer(request, Refusal("locked", 128, "since 10:04"))
            os.read(done[0], 1)
            return request.wants_why

    def ask() -> bool:
        os.read(ready[0], 1)
        with PlayedRequester(broker.folder) as requester:
            requester.ask(PLEASE, uid=NOBODY, wants_why=True)
            outcome = requester.response().outcome
        os.write(done[1], b"x")
        return outcome == Refusal("locked", 128)

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if ask() else 1
        finally:
            os._exit(status)
    assert in_child(serve, uid=NOBODY) is False
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*ready, *done):
        os.close(end)


@pytest.mark.parametrize(
    ("requester", "owner", "shown"),
    [(0, 0, None), (0, 1000, None), (1000, 1000, None), (1000, 0, 1000), (1001, 1000, 1001)],
)
def test_the_owner_of_a_broker_sees_as_much_of_it_as_root(
    requester: int, owner: int, shown: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def whole_status(uid: int | None) -> dict[str, object]:
        asked.append(uid)
        return {}

    monkeypatch.setattr(os, "geteuid", lambda: owner)
    listener = object.__new__(Requesters)
    listener.whole_status = whole_status
    connection, origin = SimpleNamespace(uid=requester), SimpleNamespace(settle=lambda outcome: None)
    envelope = Envelope(1, 1, "broker.status", Requester(requester, 1), 0, b"")
    listener.ask(cast(Any, connection), envelope, cast(Any, origin))
    assert asked == [shown]


def test_only_root_and_the_owner_see_the_status_of_all_uids(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon:
        found = broker.status()
        assert "junk" in found and "latencies" in found
        (mine,) = found["daemons"]
        assert (mine["uid"], mine["portid"]) == (os.getuid(), daemon.socket.portid)
        assert found["broker"]["pid"] == broker.pid
        if os.geteuid() == 0:
            assert in_child(broker.status, uid=NOBODY)["daemons"] == []
            assert "junk" not in in_child(broker.status, uid=NOBODY)


def test_status_shows_what_is_pending_and_no_bodies(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(PLEASE)
        request = daemon.request()
        found = broker.daemon()
        assert found is not None
        (pending,) = found["pending"]
        assert (pending["index"], pending["seq"], pending["service"]) == (request.index, request.seq, "key")
        assert set(pending) == {"index", "seq", "service", "age"}


@pytest.mark.parametrize("deadline", [1, 10**6, (1 << 64) - 1], ids=["long past", "a millisecond", "never"])
def test_a_requesters_deadline_is_kept_whether_past_near_or_absent(broker: RunningBroker, deadline: int) -> None:
    data = pack_request(Envelope(1, 0, "key", Requester(os.getuid(), 0), deadline, PLEASE))
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.send(data)
        if deadline > 1 << 63:
            daemon.answer(daemon.request(), GOOD)
            assert requester.reason() == "answered"
        else:
            assert requester.reason() == "timed-out"


def test_a_client_raises_no_broker_after_the_broker_has_gone(broker: RunningBroker) -> None:
    with broker.client() as client:
        broker.kill()
        with pytest.raises(NoBroker):
            client.status()
    with pytest.raises(NoBroker):
        broker.client()


def test_a_refusal_raised_by_the_client_has_its_reason_and_errno(broker: RunningBroker) -> None:
    with broker.client() as client, pytest.raises(Refused) as caught:
        client.ask("moon", b"")
    assert (caught.value.reason, caught.value.errno) == ("no-service", 95)
