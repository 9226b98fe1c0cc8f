"""Asking by systemd's password agents: the agent is played by the test, over the real protocol."""

from __future__ import annotations

import configparser
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Question, Turn, Unanswered, Unavailable, Withdrawn
from upcall.daemon.prompting.systemd import PasswordAgents, folder
from upcall.testing.processes import PATIENCE, in_child, until

QUESTION = Question("PIN of the card", ("Token: card = 1", "For: cat (pid 1)"))
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class Scene:
    """A question, and the folder where agents find it."""

    def __init__(self, run: Path) -> None:
        self.place = run / "systemd" / "ask-password"
        self.place.mkdir(parents=True)
        self.way = PasswordAgents({"XDG_RUNTIME_DIR": str(run)})
        self.turn = Turn(PATIENCE)

    def ask(self, pool: ThreadPoolExecutor) -> Future[bytearray]:
        return pool.submit(self.way.ask, QUESTION, self.turn)

    def asked(self) -> configparser.SectionProxy:
        """What an agent reads."""
        (path,) = until(lambda: list(self.place.glob("ask.*")) or None, "a question")
        found = configparser.ConfigParser(interpolation=None)
        found.optionxform = str  # type: ignore[assignment, method-assign]
        found.read_string(path.read_text())
        return found["Ask"]

    def send(self, *answers: bytes) -> None:
        target = self.asked()["Socket"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for answer in answers:
                sender.sendto(answer, target)


@pytest.fixture
def scene(folder: Path) -> Iterator[Scene]:
    made = Scene(folder.parent / "run")  # a short name: sockets are bound there
    yield made
    made.turn.close()
    assert list(made.place.iterdir()) == []


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


def test_the_question_file_tells_agents_message_time_and_socket(scene: Scene, pool: ThreadPoolExecutor) -> None:
    answer = scene.ask(pool)
    asked = scene.asked()
    assert asked["Message"] == "PIN of the card; Token: card = 1; For: cat (pid 1)"
    assert (asked["PID"], asked["Echo"], asked["AcceptCached"]) == (str(os.getpid()), "0", "0")
    assert 0 < int(asked["NotAfter"]) / 1e6 - time.monotonic() <= PATIENCE
    assert Path(asked["Socket"]).stat().st_mode & 0o777 == 0o600
    assert Path(asked["Socket"]).parent == scene.place
    scene.send(b"+271828\0")
    assert answer.result(PATIENCE) == b"271828"


@pytest.mark.parametrize("said", [b"+271828", b"+271828\0", b"+271828\0other\0"])
def test_an_agents_pin_is_taken_and_malformed_answers_are_skipped(
    scene: Scene, pool: ThreadPoolExecutor, said: bytes
) -> None:
    answer = scene.ask(pool)
    scene.send(b"", b"?", b"+" + b"x" * 5000, said)  # what makes no sense is passed over
    assert answer.result(PATIENCE) == b"271828"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([b"-"], Cancelled),
        ([b"+"], Cancelled),
        ([b"+\0"], Cancelled),
        ([b"+" + b"7" * (MAX_PIN + 1)], Unavailable),
    ],
    ids=["cancelled", "empty", "only a NUL", "too long"],
)
def test_a_cancelled_empty_or_too_long_answer_fails_the_question(
    scene: Scene, pool: ThreadPoolExecutor, said: list[bytes], error: type[Exception]
) -> None:
    answer = scene.ask(pool)
    scene.send(*said)
    with pytest.raises(error):
        answer.result(PATIENCE)


@root_only
def test_an_answer_from_another_uid_is_ignored(pool: ThreadPoolExecutor, folder: Path) -> None:
    """Even where the folder and the socket would let it in."""
    scene = Scene(folder.parent)
    for path in (scene.place.parent, scene.place):
        path.chmod(0o755)
    answer = scene.ask(pool)
    target = scene.asked()["Socket"]
    Path(target).chmod(0o666)

    def forge() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            return sender.sendto(b"+666666\0", target)

    assert in_child(forge, uid=65534) == 8
    scene.send(b"+271828\0")
    assert answer.result(PATIENCE) == b"271828"
    scene.turn.close()


def test_a_question_without_an_answer_in_time_is_unanswered(scene: Scene) -> None:
    short = Turn(0.1)
    with pytest.raises(Unanswered):
        scene.way.ask(QUESTION, short)
    short.close()


def test_a_withdrawn_question_stops_waiting(scene: Scene, pool: ThreadPoolExecutor) -> None:
    answer = scene.ask(pool)
    scene.asked()
    scene.turn.withdraw()
    with pytest.raises(Withdrawn):
        answer.result(PATIENCE)


def test_only_a_folder_that_others_cannot_write_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", _ordinary(os.geteuid()))
    there = {"XDG_RUNTIME_DIR": str(tmp_path)}
    place = tmp_path / "systemd" / "ask-password"
    assert folder(there) is None
    assert not PasswordAgents(there).available()
    with pytest.raises(Unavailable):
        PasswordAgents(there).ask(QUESTION, Turn(1))
    place.mkdir(parents=True)
    if place.stat().st_uid == os.geteuid():
        assert folder(there) == place
    place.chmod(0o777)
    assert folder(there) is None
    assert folder({}) is None


def _ordinary(uid: int) -> Callable[[], int]:
    return lambda: uid or 12345  # so that the system's own folder stays out of it


def test_a_notice_is_not_given_to_password_agents(scene: Scene) -> None:
    assert not scene.way.notify(QUESTION, scene.turn)
