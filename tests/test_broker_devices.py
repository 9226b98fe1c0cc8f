"""The broker's side towards eCryptfs, with a kernel that is played: it always reads, and only checked answers and
plain failures are written."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.broker.server import Server
from upcall.client import Client
from upcall.core.messages import Answer, Refusal
from upcall.process.log import EventLog
from upcall.process.paths import own_place
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs import source as devices
from upcall.protocols.ecryptfs.packets import (
    REQUEST,
    Ask,
    FileKey,
    Frame,
    Reply,
    pack_ask,
    pack_file_key,
    pack_frame,
    pack_reply,
)
from upcall.protocols.ecryptfs.protocol import ECRYPTFS
from upcall.protocols.ecryptfs.source import Devices
from upcall.testing.kernel import PlayedKernel, PlayedUpcall, broker_below, source_of, sources
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, StartDaemon, until
from upcall.testing.toy import make_toy_key

ME = os.getuid()
FILE_KEY = pack_file_key(FileKey(7, b"0123456789abcdef"))
SIGNATURE = "0123456789abcdef"
ENCRYPT, DECRYPT = pack_ask(Ask(0x42, SIGNATURE, FILE_KEY)), pack_ask(Ask(0x40, SIGNATURE, bytes(256)))
GOOD = Answer(pack_reply(Reply(0x41, 0, FILE_KEY)))
HOUR = 3600.0  # seconds: longer than any test waits
PATIENT = {**SERVICES, "ecryptfs": SERVICES["ecryptfs"]._replace(patience=HOUR)}


@pytest.fixture
def kernel() -> PlayedKernel:
    """Its processes wait longer than those of the real one, which a busy machine does not always answer in time."""
    return PlayedKernel(timeout=PATIENCE)


@pytest.fixture
def server(kernel: PlayedKernel, folder: Path) -> Iterator[Server]:
    """A broker without a time-out of its own: what is failed is failed at once, or never."""
    with broker_below(kernel, folder, services=PATIENT) as running:
        yield running


@pytest.fixture
def daemon(server: Server, kernel: PlayedKernel, folder: Path) -> Iterator[PlayedDaemon]:
    with PlayedDaemon(folder) as played:
        until(lambda: kernel.is_open(ME), "the device is open")
        yield played


def error_of(upcall: PlayedUpcall) -> str:
    try:
        upcall.result()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "answered"


def served(server: Server, pid: int) -> None:
    def look() -> bool:
        association = server.router.registry.get(ME)
        return association is not None and association.pid == pid

    until(look, "registered")


def counts(server: Server) -> dict[str, int]:
    return dict(source_of(server, Devices).counts)


def test_two_keys_wrap_and_unwrap_through_the_device(
    server: Server, kernel: PlayedKernel, folder: Path, start_daemon: StartDaemon, keyring: FolderKeyring
) -> None:
    served(server, start_daemon().pid)
    until(lambda: kernel.is_open(ME), "the device is open")
    for number in range(2):
        name, blob = make_toy_key(folder.parent / f"{number}.key")
        keyring.add(name, "toy", blob)
        wrapped = kernel.ask(ME, pack_ask(Ask(0x42, name, FILE_KEY))).result()
        assert kernel.ask(ME, pack_ask(Ask(0x40, name, wrapped))).result() == FILE_KEY
    assert error_of(kernel.ask(ME, ENCRYPT)) == "EIO"  # no such key
    assert (kernel.refused, kernel.lost) == ([], [])


def test_the_device_is_open_only_while_a_daemon_is_registered(
    server: Server, kernel: PlayedKernel, folder: Path
) -> None:
    assert error_of(kernel.ask(ME, DECRYPT)) == "ENOTCONN"
    with PlayedDaemon(folder) as daemon:
        until(lambda: kernel.is_open(ME), "the device is open")
        daemon.quit()
        until(lambda: not kernel.is_open(ME), "the device is closed")


def test_stale_frames_are_read_and_never_answered(server: Server, kernel: PlayedKernel, daemon: PlayedDaemon) -> None:
    for seq in range(40):
        kernel.say(ME, pack_frame(Frame(REQUEST, seq)))
    until(lambda: counts(server).get("stale") == 40, "all are read")
    assert daemon.silent()
    assert kernel.refused == []
    upcall = kernel.ask(ME, DECRYPT)
    daemon.answer(daemon.request(), GOOD)
    assert upcall.result() == FILE_KEY


@pytest.mark.parametrize(
    "data",
    [b"", b"\x66", b"\x66\0\0\0", pack_frame(Frame(REQUEST, 1, 0, DECRYPT))[:-1],
     pack_frame(Frame(103, 1, 0, DECRYPT)), pack_frame(Frame(100, 0)),
     b"\x66\0\0\0\1\xff\xff" + bytes(20), bytes(547)],
    ids=["a signal", "1 byte", "4 bytes", "cut short", "a RESPONSE", "HELO", "a length of five bytes", "zeros"],
)  # fmt: skip
def test_a_malformed_frame_is_read_and_nothing_is_written(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon, data: bytes
) -> None:
    kernel.say(ME, data)
    upcall = kernel.ask(ME, DECRYPT)
    daemon.answer(daemon.request(), GOOD)
    assert upcall.result() == FILE_KEY
    assert kernel.refused == []


@pytest.mark.parametrize(
    "packet",
    [b"", b"\x99", b"\x44junk", DECRYPT[:-1], DECRYPT + b"x", b"\x42\x01x\x00"],
    ids=["empty", "tag alone", "junk", "cut short", "a byte too many", "short signature"],
)
def test_a_malformed_packet_is_failed_at_once_without_asking_the_daemon(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon, packet: bytes
) -> None:
    upcall = kernel.ask(ME, packet)
    until(lambda: upcall.settled, "settled")
    assert (upcall.answer or b"")[1:] == b"\xff"
    assert daemon.silent()


@pytest.mark.parametrize(
    ("packet", "outcome"),
    [
        pytest.param(ENCRYPT, Answer(pack_reply(Reply(0x43, 0, b""))), id="size 0"),
        pytest.param(ENCRYPT, Answer(pack_reply(Reply(0x43, 0, b"x"))), id="size 1"),
        pytest.param(ENCRYPT, Answer(pack_reply(Reply(0x43, 0, bytes(513)))), id="too long"),
        pytest.param(ENCRYPT, Answer(pack_reply(Reply(0x43, 0, FILE_KEY + bytes(200)))), id="the clear key"),
        pytest.param(ENCRYPT, Answer(pack_reply(Reply(0x43, 0, bytes(256))) + b"x"), id="trailing junk"),
        pytest.param(ENCRYPT, GOOD, id="the other tag"),
        pytest.param(ENCRYPT, Answer(b""), id="nothing"),
        pytest.param(DECRYPT, Answer(pack_reply(Reply(0x41, 0, FILE_KEY[:-1] + b"\1"))), id="checksum"),
        pytest.param(DECRYPT, Answer(pack_reply(Reply(0x41, 0, b"\x08" + FILE_KEY[1:]))), id="cipher"),
        pytest.param(DECRYPT, Refusal("locked", 1), id="a refusal"),
        pytest.param(DECRYPT, Refusal("moon", 1), id="a refusal that nobody knows"),
    ],
)
def test_an_invalid_answer_of_the_daemon_fails_the_caller_with_eio_at_once(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon, packet: bytes, outcome: Answer | Refusal
) -> None:
    upcall = kernel.ask(ME, packet)
    daemon.answer(daemon.request(), outcome)
    assert error_of(upcall) == "EIO"
    assert upcall.answer == bytes([packet[0] + 1, 0xFF]), "the broker's answer, and not the kernel's time-out"
    assert (kernel.refused, kernel.lost) == ([], [])


def test_a_daemon_killed_with_a_request_in_hand_fails_the_caller_with_eio_at_once(
    server: Server, kernel: PlayedKernel, start_daemon: StartDaemon, signature: str
) -> None:
    running = start_daemon()
    served(server, running.pid)
    until(lambda: kernel.is_open(ME), "the device is open")
    running.stop()
    upcall = kernel.ask(ME, pack_ask(Ask(0x42, signature, FILE_KEY)))
    until(lambda: kernel.unread(ME) == 0, "read")
    running.kill()
    assert error_of(upcall) == "EIO"
    assert upcall.answer == b"\x43\xff", "the broker's answer, and not the kernel's time-out"
    until(lambda: not kernel.is_open(ME), "the device is closed")


def test_requests_of_a_stopped_daemon_are_failed_before_the_kernel_gives_up(
    kernel: PlayedKernel, folder: Path
) -> None:
    """By the broker's own time-out, see below; the device is read until it is empty."""
    with broker_below(kernel, folder) as server, PlayedDaemon(folder) as daemon:
        until(lambda: kernel.is_open(ME), "the device is open")
        upcalls = [kernel.ask(ME, DECRYPT) for _ in range(ECRYPTFS.contexts)]
        assert error_of(kernel.ask(ME, DECRYPT)) == "ENOMEM"
        until(lambda: kernel.unread(ME) == 0, "all are read")
        assert {error_of(upcall) for upcall in upcalls} == {"EIO"}
        assert all(upcall.answer == b"\x41\xff" for upcall in upcalls)
        late = daemon.request()
        daemon.answer(late, GOOD)
        until(lambda: server.router.rejected.get(ME), "the late answer is rejected")
        upcall = kernel.ask(ME, DECRYPT)
        for _ in range(ECRYPTFS.contexts):
            request = daemon.request()
        daemon.answer(request, GOOD)
        assert upcall.result() == FILE_KEY
        assert (kernel.refused, kernel.lost) == ([], [])


def test_an_upcalls_deadline_counts_from_the_earliest_time_at_which_the_kernel_may_have_sent_it(
    kernel: PlayedKernel, folder: Path
) -> None:
    """2.5 s of the 3 s that it waits."""
    with broker_below(kernel, folder), PlayedDaemon(folder) as daemon:
        until(lambda: kernel.is_open(ME), "the device is open")
        for _ in range(3):
            before = time.monotonic()
            upcall = kernel.ask(ME, DECRYPT)
            request = daemon.request()
            assert request.deadline_ns / 1e9 - 2.5 <= before
            daemon.answer(request, GOOD)
            assert upcall.result() == FILE_KEY


def test_an_answer_to_a_caller_that_has_gone_is_refused_and_counted_only(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon
) -> None:
    upcall = kernel.ask(ME, DECRYPT)
    request = daemon.request()
    kernel.give_up(upcall)
    daemon.answer(request, GOOD)
    until(lambda: counts(server).get("not taken") == 1, "not taken")
    assert len(kernel.refused) == 1
    again = kernel.ask(ME, DECRYPT)
    daemon.answer(daemon.request(), GOOD)
    assert again.result() == FILE_KEY


def test_a_newer_daemon_answers_the_kernels_pending_request(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon, folder: Path
) -> None:
    upcall = kernel.ask(ME, DECRYPT)
    daemon.request()
    with PlayedDaemon(folder) as second:
        second.answer(second.request(), GOOD)
        assert upcall.result() == FILE_KEY
        assert kernel.is_open(ME)


def test_a_broker_that_ends_fails_the_kernels_pending_requests(kernel: PlayedKernel, folder: Path) -> None:
    with broker_below(kernel, folder, services=PATIENT), PlayedDaemon(folder) as daemon:
        until(lambda: kernel.is_open(ME), "the device is open")
        held = [kernel.ask(ME, DECRYPT) for _ in range(3)]
        daemon.request()
    assert [error_of(upcall) for upcall in held] == ["EIO"] * 3
    assert [upcall.answer for upcall in held] == [b"\x41\xff"] * 3, "the broker's answers, and not a time-out"
    assert not kernel.is_open(ME)


def test_closing_reads_and_fails_what_was_left_unread_in_the_device(kernel: PlayedKernel, folder: Path) -> None:
    """A loop that does not run has read nothing yet."""
    with (folder.parent / "log").open("wb") as log:
        place = own_place(folder)
        server = Server(place, sources(place, kernel.open), log=EventLog("broker", log.fileno()))
        source_of(server, Devices).open(ME)
        left = [kernel.ask(ME, packet) for packet in (DECRYPT, ENCRYPT, b"\x99", b"")]
        kernel.say(ME, pack_frame(Frame(REQUEST, 9)))
        kernel.say(ME, b"junk")
        server.stop()
        server.run()
    assert [upcall.answer for upcall in left] == [b"\x41\xff", b"\x43\xff", b"\x41\xff", b"\x41\xff"]
    assert kernel.refused == []
    assert not kernel.is_open(ME)


def test_a_requesters_flood_does_not_use_up_the_kernels_contexts(
    server: Server, kernel: PlayedKernel, daemon: PlayedDaemon, folder: Path
) -> None:
    with PlayedRequester(folder) as requester:
        for _ in range(40):
            requester.ask(DECRYPT)
        assert {requester.reason() for _ in range(8)} == {"no-context"}
        upcall = kernel.ask(ME, DECRYPT)
        requests = [daemon.request() for _ in range(33)]
        assert [request.service for request in requests] == ["key"] * 32 + ["ecryptfs"]
        daemon.answer(requests[-1], GOOD)
        assert upcall.result() == FILE_KEY


def test_a_device_that_cannot_be_opened_is_tried_again(
    server: Server, kernel: PlayedKernel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_RETRY", 0.01)
    kernel.cannot_open = errno.EINVAL
    with PlayedDaemon(folder), Client(folder) as client:
        until(lambda: client.status()["devices"], "told")
        (told,) = client.status()["devices"]
        assert (told["uid"], told["open"]) == (ME, False)
        assert "another daemon" in told["why"]
        kernel.cannot_open = 0
        until(lambda: kernel.is_open(ME), "the device is open")
        assert client.status()["devices"] == [{"uid": ME, "open": True}]
