"""Forged messages to a broker: wrong sockets, processes, numbers and bytes. Each is counted, and the
right answer works afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from upcall.broker.server import Server
from upcall.core.messages import Answer, Refusal
from upcall.kernel.netlink import NetlinkSocket, is_control
from upcall.process.paths import Place, own_place
from upcall.protocols.ecryptfs.packets import Ask, FileKey, Reply, pack_ask, pack_file_key, pack_reply
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, in_child, until
from upcall.wire.envelope import (
    HELO,
    MAX_MESSAGE,
    REQUEST,
    RESPONSE,
    Envelope,
    NetlinkMessage,
    pack_control,
    pack_message,
    pack_response,
)

FILE_KEY = pack_file_key(FileKey(0, b"0123456789abcdef"))
UNWRAP = pack_ask(Ask(0x40, "0123456789abcdef", b"wrapped"))
WRAP = pack_ask(Ask(0x42, "0123456789abcdef", FILE_KEY))
GOOD = Answer(pack_reply(Reply(0x41, 0, FILE_KEY)))
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class Asked:
    """A request that a played daemon has in hand."""

    def __init__(self, broker: RunningBroker) -> None:
        self.broker = broker
        self.daemon = PlayedDaemon(broker.folder)
        self.requester = PlayedRequester(broker.folder)
        self.requester.ask(UNWRAP)
        self.request: Envelope = self.daemon.request()

    def rejected(self, **counts: int) -> None:
        until(lambda: self.broker.status()["rejected"] == counts, f"rejected {counts}")

    def junk(self, **counts: int) -> None:
        """Only root sees these counters; other users see that the request is still pending."""
        if os.geteuid() == 0:
            until(lambda: self.broker.status()["junk"] == counts, f"junk {counts}")
        self.broker.pending(1)

    def still_works(self) -> None:
        self.daemon.answer(self.request, GOOD)
        assert self.requester.reason() == "answered"


@pytest.fixture
def asked(broker: RunningBroker) -> Iterator[Asked]:
    held = Asked(broker)
    yield held
    held.daemon.close()
    held.requester.close()


def test_both_portids_of_a_link_stay_taken_after_the_daemon_closed_its_copies(asked: Asked) -> None:
    """The broker keeps a copy of each socket."""
    ends = asked.daemon.socket.portid, asked.daemon.far.portid
    asked.daemon.far.close()
    for portid in ends:
        with pytest.raises(OSError, match="in use"):
            NetlinkSocket(portid)
    asked.still_works()


def test_both_portids_of_a_link_stay_taken_while_the_daemon_lives(broker: RunningBroker) -> None:
    daemon = PlayedDaemon(broker.folder)
    broker.kill()
    for portid in (daemon.socket.portid, daemon.far.portid):
        with pytest.raises(OSError, match="in use"):
            NetlinkSocket(portid)
    daemon.close()
    for portid in (daemon.socket.portid, daemon.far.portid):
        NetlinkSocket(portid).close()


def test_an_answer_from_another_socket_of_the_process_is_refused_by_the_kernel(asked: Asked) -> None:
    forger = NetlinkSocket()
    with pytest.raises(ConnectionRefusedError):
        forger.send_to(pack_response(asked.request.seq, asked.request.index, GOOD), asked.daemon.broker)
    forger.close()
    asked.still_works()


def test_an_answer_from_another_process_is_refused_by_the_kernel(asked: Asked) -> None:
    def forge() -> str:
        try:
            NetlinkSocket().send_to(pack_response(asked.request.seq, asked.request.index, GOOD), asked.daemon.broker)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "sent"

    assert in_child(forge) == "ECONNREFUSED"
    asked.still_works()


def test_an_answer_from_a_child_that_inherited_the_socket_is_rejected(asked: Asked) -> None:
    def forge() -> str:
        asked.daemon.answer(asked.request, GOOD)
        return "sent"

    assert in_child(forge) == "sent"
    asked.junk(pid=1)
    asked.still_works()


@root_only
def test_an_answer_from_another_uid_that_inherited_the_socket_is_rejected(asked: Asked) -> None:
    def forge() -> str:
        asked.daemon.answer(asked.request, GOOD)
        return "sent"

    assert in_child(forge, uid=NOBODY) == "sent"
    asked.junk(uid=1)
    asked.still_works()


def test_answers_with_wrong_numbers_are_rejected_and_the_right_one_still_counts(asked: Asked) -> None:
    seq, index = asked.request.seq, asked.request.index
    for wrong_seq, wrong_index in ((seq + 1 & 0xFFFFFFFF, index), (seq, index + 1), (seq, 1 << 31), (0, 0xFFFFFFFF)):
        asked.daemon.send(pack_response(wrong_seq, wrong_index, GOOD))
    asked.rejected(sequence=1, state=1, index=2)
    asked.still_works()


def test_duplicate_answers_are_rejected(asked: Asked) -> None:
    asked.still_works()
    asked.daemon.answer(asked.request, GOOD)
    asked.daemon.answer(asked.request, Refusal("locked", 1))
    asked.rejected(state=2)


def test_a_late_answer_is_rejected_after_its_context_was_reused(asked: Asked) -> None:
    """32 other requests, so that the first one's index comes round again."""
    asked.still_works()
    for _ in range(32):
        asked.requester.ask(UNWRAP)
        request = asked.daemon.request()
        if request.index == asked.request.index:
            break
        asked.daemon.answer(request, GOOD)
        assert asked.requester.reason() == "answered"
    else:
        pytest.fail("the index did not come back")
    asked.daemon.answer(asked.request, GOOD)
    asked.rejected(sequence=1)
    asked.daemon.answer(request, GOOD)
    assert asked.requester.reason() == "answered"


@pytest.mark.parametrize(
    "data",
    [b"x", bytes(15), bytes(16), bytes(24), b"\xff" * 40, pack_control(99), pack_control(HELO) + b"x",
     pack_message(NetlinkMessage(REQUEST, 1, 0, b""))],
    ids=["a byte", "15", "16", "24", "ones", "type 99", "HELO and more", "a REQUEST"],
)  # fmt: skip
def test_junk_instead_of_a_message_is_counted_and_dropped(asked: Asked, data: bytes) -> None:
    asked.daemon.send(data)
    asked.junk(message=1)
    asked.still_works()


def test_a_response_too_short_for_an_index_is_rejected(asked: Asked) -> None:
    asked.daemon.send(struct.pack("=IHHII", 16, RESPONSE, 0, asked.request.seq, 0))
    asked.rejected(length=1)
    asked.still_works()


@pytest.mark.parametrize(
    "body", [b"", b"\1\0\0\0", b"\1\0\0\0junk", b"\2\0\0\0"], ids=["empty", "empty answer", "junk", "unknown version"]
)
def test_garbage_in_a_fitting_envelope_settles_as_bad_answer(asked: Asked, body: bytes) -> None:
    asked.daemon.send(pack_message(NetlinkMessage(RESPONSE, asked.request.seq, asked.request.index, body)))
    assert asked.requester.reason() == "bad-answer"
    asked.requester.ask(UNWRAP)
    asked.request = asked.daemon.request()
    asked.still_works()


@pytest.mark.parametrize("size", [MAX_MESSAGE + 1, 200_000])
def test_an_answer_longer_than_the_protocol_allows_settles_as_bad_answer(asked: Asked, size: int) -> None:
    """It arrives truncated, but the envelope names the request, which is refused at once."""
    head = struct.pack("=IHHIIII", size, RESPONSE, 0, asked.request.seq, 0, asked.request.index, size - 24)
    asked.daemon.send(head.ljust(size, b"x"))
    assert asked.requester.reason() == "bad-answer"


@pytest.mark.parametrize(
    ("asks", "reply"),
    [
        pytest.param(WRAP, Reply(0x43, 0, b""), id="size 0"),
        pytest.param(WRAP, Reply(0x43, 0, b"x"), id="size 1"),
        pytest.param(WRAP, Reply(0x43, 0, bytes(513)), id="too long"),
        pytest.param(WRAP, Reply(0x43, 0, FILE_KEY + bytes(40)), id="the clear key"),
        pytest.param(WRAP, Reply(0x41, 0, FILE_KEY), id="the other tag"),
        pytest.param(WRAP, Reply(0x43, 0xFF, b""), id="a failure as an answer"),
        pytest.param(UNWRAP, Reply(0x41, 0, FILE_KEY[:-1] + b"\1"), id="checksum"),
        pytest.param(UNWRAP, Reply(0x41, 0, b"\x07" + FILE_KEY[1:-3] + FILE_KEY[-2:]), id="size"),
        pytest.param(UNWRAP, Reply(0x41, 0, b"\x99" + FILE_KEY[1:]), id="cipher"),
        pytest.param(UNWRAP, Reply(0x41, 0, b""), id="nothing"),
    ],
)
def test_answers_that_the_service_does_not_allow_are_refused_as_bad_answer(
    broker: RunningBroker, asks: bytes, reply: Reply
) -> None:
    with PlayedDaemon(broker.folder) as daemon, PlayedRequester(broker.folder) as requester:
        requester.ask(asks)
        daemon.answer(daemon.request(), Answer(pack_reply(reply)))
        assert requester.reason() == "bad-answer"


def test_a_daemons_flood_of_junk_slows_only_that_daemon(asked: Asked) -> None:
    """Its socket is read in batches with pauses; the broker's other sockets are served meanwhile."""
    forged = pack_response(asked.request.seq + 1 & 0xFFFFFFFF, asked.request.index, GOOD)
    stop, sent = threading.Event(), Counter[bool]()

    def flood() -> None:
        while not stop.is_set():
            fits = asked.daemon.socket.send(forged)
            sent[fits] += 1
            if not fits:
                stop.wait(0.001)

    flooder = threading.Thread(target=flood)
    flooder.start()
    try:
        until(lambda: sent[False], "the flood is faster than the broker reads")
        for _ in range(20):
            asked.broker.status()
        before = sent.total()
        until(lambda: sent.total() > before, "the flood goes on meanwhile")
    finally:
        stop.set()
        flooder.join()
    until(lambda: asked.daemon.socket.send(pack_response(asked.request.seq, asked.request.index, GOOD)), "room again")
    assert asked.requester.reason() == "answered"


# --- registration --------------------------------------------------------------------------------------------


def test_flags_sequence_and_pid_in_a_helo_are_ignored(broker: RunningBroker) -> None:
    """Credentials come from the kernel, not from the message."""
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.hello()
        daemon.link_taken()
        daemon.send(pack_message(NetlinkMessage(HELO, 0xFFFFFFFF, 0, None, 0xFFFF, 1)))
        assert is_control(daemon.receive().data, HELO)
        broker.registered(os.getpid())


def test_a_helo_sent_by_a_child_registers_no_daemon(broker: RunningBroker) -> None:
    """The parent asked for the link, and must send HELO itself."""
    with PlayedDaemon(broker.folder, register=False) as daemon:
        daemon.hello()
        daemon.link_taken()
        assert in_child(lambda: daemon.socket.send(pack_control(HELO)))
        broker.logged("on=pid")
        assert broker.daemon() is None
        daemon.send(pack_control(HELO))
        broker.registered(os.getpid())


def test_a_daemons_registration_ends_with_it_although_its_child_keeps_the_link(broker: RunningBroker) -> None:
    """The child has both sockets and the connection, but cannot register with them."""
    gone, ended = os.pipe(), os.pipe()  # closed by us: go on; closed by the child: it has
    parent = os.fork()
    if parent == 0:
        try:
            daemon = PlayedDaemon(broker.folder)
            if os.fork():
                os._exit(0)
            os.close(gone[1])
            os.read(gone[0], 1)
            with contextlib.suppress(OSError):
                daemon.send(pack_control(HELO))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
    os.close(ended[1])
    until(lambda: broker.daemon() is None, "gone")
    os.close(gone[1])
    assert os.read(ended[0], 1) == b""
    assert broker.daemon() is None
    os.close(gone[0])
    os.close(ended[0])


@root_only
def test_another_uid_cannot_register_with_a_users_own_broker(folder: Path) -> None:
    """Root cannot, either."""
    ready = os.pipe()

    def serve() -> int:
        server = Server(own_place(folder))
        os.write(ready[1], b"x")

        def refused() -> None:
            until(lambda: bool(server.sources[-1].status(None)["junk"]), "a refusal")
            server.stop()

        threading.Thread(target=refused).start()
        server.run()
        return len(server.router.registry)

    os.chown(folder.parent, NOBODY, NOBODY)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(in_child, serve, uid=NOBODY)
        os.read(ready[0], 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(Place(folder).registration_socket))
            connection.send(pack_control(HELO))
            assert connection.recv(64) == b""
        assert served.result() == 0
    for end in ready:
        os.close(end)


@root_only
def test_another_user_is_registered_for_its_own_uid_only(asked: Asked) -> None:
    def register() -> bool:
        with PlayedDaemon(asked.broker.folder):
            found = asked.broker.status()
            return [one["uid"] for one in found["daemons"]] == [NOBODY]

    assert in_child(register, uid=NOBODY)
    asked.still_works()
    until(lambda: [one["uid"] for one in asked.broker.status()["daemons"]] == [0], "only ours is left")
