"""Terminals that lie, are slow or go away: the daemon's side of `upcall prompt`, over real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from upcall.core.errors import UpcallError
from upcall.daemon.prompting.agent import REPLACED, Agent
from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Question, Turn, Unanswered, Unavailable
from upcall.process.log import EventLog
from upcall.testing.processes import PATIENCE
from upcall.wire.isolation import (
    ANSWER,
    CLOSE,
    FAILED,
    MAX_MESSAGE,
    OPEN,
    PIN,
    REFUSED,
    TOUCH,
    ChildMessage,
    pack,
    take,
)

QUESTION = Question("PIN of the card", ("Token: card",))


class Scene:
    def __init__(self) -> None:
        self.log_reader, writer = os.pipe()
        self.agent = Agent(EventLog("test", writer))
        self.turn = Turn(PATIENCE)
        self.pool = ThreadPoolExecutor()

    def attach(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.agent.attach(theirs, b"welcome")
        ours.settimeout(PATIENCE)
        assert ours.recv(100) == b"welcome"
        return ours

    def ask(self) -> Future[bytearray]:
        return self.pool.submit(self.agent.ask, QUESTION, self.turn)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.turn.withdraw()
    made.pool.shutdown()
    made.turn.close()


def heard(connection: socket.socket) -> ChildMessage:
    return take(connection.recv(MAX_MESSAGE))


def test_a_pin_typed_at_the_terminal_answers_the_question(scene: Scene) -> None:
    terminal = scene.attach()
    answer = scene.ask()
    asked = heard(terminal)
    assert (asked.kind, asked.data) == (PIN, b"PIN of the card\nToken: card")
    terminal.send(pack(ChildMessage(ANSWER, asked.id + 7, data=b"old")))  # to a question of a while ago
    terminal.send(pack(ChildMessage(ANSWER, asked.id, data=b"1234")))
    assert answer.result(PATIENCE) == b"1234"
    assert scene.agent.available()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (lambda n: ChildMessage(REFUSED, n, text="locked"), Cancelled),
        (lambda n: ChildMessage(ANSWER, n), Cancelled),
        (lambda n: ChildMessage(FAILED, n, text="in the\nbackground"), Unavailable),
        (lambda n: ChildMessage(ANSWER, n, data=b"7" * (MAX_PIN + 1)), Unavailable),
    ],
    ids=["refused", "empty", "failed", "too long"],
)
def test_a_refusal_or_a_bad_pin_fails_the_question_and_keeps_the_terminal(
    scene: Scene, said: Callable[[int], ChildMessage], error: type[UpcallError]
) -> None:
    terminal = scene.attach()
    answer = scene.ask()
    terminal.send(pack(said(heard(terminal).id)))
    with pytest.raises(error) as caught:
        answer.result(PATIENCE)
    assert str(caught.value).isprintable()
    assert scene.agent.available()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"x",
        bytes(100),
        bytes(pack(ChildMessage(OPEN, 1))),
        bytes(pack(ChildMessage(CLOSE, 1))),
        bytes(pack(ChildMessage(ANSWER, 1, data=b"7" * 5000))),
        b"many",
    ],
    ids=["closed", "one byte", "zeros", "open", "close", "too long", "many answers"],
)
def test_a_terminal_that_breaks_the_protocol_is_disconnected(scene: Scene, said: bytes) -> None:
    """Afterwards no terminal is attached."""
    terminal = scene.attach()
    answer = scene.ask()
    heard(terminal)
    if said == b"many":
        for _ in range(16):
            terminal.send(pack(ChildMessage(ANSWER, 999, data=b"1234")))
    elif said:
        terminal.send(said)
    else:
        terminal.close()
    with pytest.raises(Unavailable, match="no terminal is attached"):
        answer.result(PATIENCE)
    assert not scene.agent.available()


def test_a_newer_terminal_takes_over_the_pending_question(scene: Scene) -> None:
    older = scene.attach()
    answer = scene.ask()
    heard(older)
    newer = scene.attach()
    assert heard(older).text == REPLACED
    assert older.recv(100) == b""
    asked = heard(newer)
    newer.send(pack(ChildMessage(ANSWER, asked.id, data=b"1234")))
    assert answer.result(PATIENCE) == b"1234"


def test_a_terminal_that_closed_between_questions_is_unavailable(scene: Scene) -> None:
    scene.attach().close()
    assert not scene.agent.available()
    assert not scene.agent.notify(QUESTION, scene.turn)
    with pytest.raises(Unavailable):
        scene.agent.ask(QUESTION, scene.turn)


def test_a_terminal_that_reads_nothing_is_not_waited_for(scene: Scene) -> None:
    """Its queue fills up; the next question fails at once."""
    terminal = scene.attach()
    while scene.agent.notify(QUESTION, scene.turn):
        pass
    with pytest.raises(Unavailable):
        scene.agent.ask(QUESTION, scene.turn)
    terminal.close()


def test_an_overdue_question_is_withdrawn_from_the_terminal(scene: Scene) -> None:
    terminal = scene.attach()
    short = Turn(0.1)
    with pytest.raises(Unanswered):
        scene.agent.ask(QUESTION, short)
    short.close()
    asked = heard(terminal)
    assert heard(terminal) == ChildMessage(CLOSE, asked.id, data=bytearray())


def test_a_notice_reaches_the_terminal_as_a_request_for_touch(scene: Scene) -> None:
    terminal = scene.attach()
    assert scene.agent.notify(QUESTION, scene.turn)
    assert heard(terminal).kind == TOUCH
