"""The played /dev/ecryptfs of the benchmarks makes the kernel's frames, and counts what the kernel would reject."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from bench.stage import BenchError, Client, Sample, Stage
from upcall.protocols.ecryptfs.packets import (
    HELO,
    QUIT,
    REQUEST,
    RESPONSE,
    TAG_64,
    TAG_65,
    Ask,
    Frame,
    Reply,
    pack_ask,
    pack_frame,
    pack_reply,
    take_frame,
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) for the peers")

ASKED = pack_ask(Ask(TAG_64, "0123456789abcdef", bytes(256)))
RIGHT = pack_reply(Reply(TAG_65, 0, b"\x07" + bytes(range(16)) + b"\x00\x78"))
WRONG = RIGHT[:-1] + b"\x79"
Answer = Callable[[Frame], list[bytes]]


def answer_to(frame: Frame, packet: bytes = RIGHT) -> bytes:
    return pack_frame(Frame(RESPONSE, frame.seq, frame.index, packet))


class Played:
    """A played kernel and a server of the test's own, which answers by a function."""

    def __init__(self, stage: Stage, answer: Answer) -> None:
        kernels, self._mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with kernels:
            command = [str(stage.folder / "peer"), "drive-device", str(kernels.fileno())]
            self.kernel = Client(stage.start(command, talks=True, inherits=[kernels.fileno()])).ready()
        self._answer = answer
        self.asked: list[Frame] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._mine, contextlib.suppress(ConnectionError):  # when the kernel ends
            while data := self._mine.recv(65536):
                self.asked.append(take_frame(data))
                for answer in self._answer(self.asked[-1]):
                    self._mine.send(answer)

    def run(self, count: int, inflight: int = 1, size: int | None = None) -> Sample:
        return self.kernel.body(ASKED, RIGHT, size).sample(count, inflight, 5.0)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as one:
        one.compile()
        yield one


def test_its_requests_are_frames_of_the_kernel_with_a_counter_and_a_context_each(stage: Stage) -> None:
    played = Played(stage, lambda frame: [answer_to(frame)])
    sample = played.run(40, 8)
    assert (sample.answered, sample.refused, sample.wrong) == (40, 0, 0)
    assert [frame.type for frame in played.asked] == [REQUEST] * 40
    assert [frame.seq for frame in played.asked] == list(range(1, 41))
    assert {frame.index for frame in played.asked} == set(range(8))
    assert {frame.data for frame in played.asked} == {ASKED}
    assert sample.p50 <= sample.p99 <= sample.p999 <= sample.wall


def test_a_wrong_packet_is_counted_and_a_failure_is_refused(stage: Stage) -> None:
    wrong = Played(stage, lambda frame: [answer_to(frame, WRONG)]).run(3)
    assert (wrong.answered, wrong.refused, wrong.wrong) == (3, 0, 3)
    failed = Played(stage, lambda frame: [answer_to(frame, bytes((TAG_65, 0xFF)))]).run(3)
    assert (failed.answered, failed.refused, failed.wrong) == (3, 3, 0)


def test_a_packet_that_is_too_long_is_wrong(stage: Stage) -> None:
    found = Played(stage, lambda frame: [answer_to(frame, RIGHT + b"\0")]).run(2)
    assert found.wrong == 2


def test_of_an_answer_that_varies_only_the_beginning_and_the_size_are_compared(stage: Stage) -> None:
    played = Played(stage, lambda frame: [answer_to(frame, RIGHT + bytes((frame.seq,)))])
    assert played.run(3, size=len(RIGHT) + 1).wrong == 0
    assert played.kernel.answers() == [RIGHT + bytes((seq,)) for seq in (1, 2, 3)]


def test_only_the_last_64_answers_are_kept(stage: Stage) -> None:
    played = Played(stage, lambda frame: [answer_to(frame, RIGHT + bytes((frame.seq,)))])
    played.run(70, size=len(RIGHT) + 1)
    assert {answer[-1] for answer in played.kernel.answers()} == set(range(7, 71))


def test_helo_and_quit_of_a_server_are_ignored(stage: Stage) -> None:
    greeting = [pack_frame(Frame(kind, 0)) for kind in (HELO, QUIT)]
    sample = Played(stage, lambda frame: [*greeting, answer_to(frame)]).run(3)
    assert (sample.answered, sample.wrong) == (3, 0)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda frame: answer_to(frame)[:4], id="shorter than its head"),
        pytest.param(lambda frame: answer_to(frame)[:-1], id="truncated"),
        pytest.param(lambda frame: answer_to(frame) + b"\0", id="longer than its length"),
        pytest.param(lambda frame: answer_to(frame, b""), id="without a packet"),
        pytest.param(lambda frame: pack_frame(frame), id="of another type"),
        pytest.param(lambda frame: answer_to(frame._replace(seq=frame.seq - 1)), id="of another request"),
        pytest.param(lambda frame: answer_to(frame._replace(index=31)), id="of a free context"),
        pytest.param(lambda frame: answer_to(frame._replace(index=32)), id="of no context"),
        pytest.param(lambda frame: answer_to(frame._replace(index=2**32 - 1)), id="of the last index"),
    ],
)
def test_what_the_kernel_would_reject_is_counted_as_wrong(stage: Stage, spoil: Callable[[Frame], bytes]) -> None:
    sample = Played(stage, lambda frame: [spoil(frame), answer_to(frame)]).run(3)
    assert (sample.answered, sample.wrong) == (3, 3)


def test_a_second_answer_is_counted_as_wrong(stage: Stage) -> None:
    played = Played(stage, lambda frame: [answer_to(frame), answer_to(frame)])
    assert played.run(3).wrong >= 2  # that of the last request may come after the run


def test_the_kernel_has_32_contexts(stage: Stage) -> None:
    with pytest.raises(BenchError, match="refuses"):
        Played(stage, lambda frame: [answer_to(frame)]).run(40, 33)
