"""Asking by pinentry: a real one on a terminal, and played ones that do what they must not."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from upcall.daemon.prompting.pinentry import Pinentry, escaped
from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Question, Turn, Unanswered, Unavailable, Withdrawn
from upcall.testing.processes import PATIENCE, NotInTime, in_time, until

QUESTION = Question("PIN of the 100% card", ("Token: card", "For: cat (pid 1)"))
HOUR = 3600.0  # seconds

# A pinentry that says OK to all commands but GETPIN.
FRAME = 'echo OK; while read -r line; do echo "$line" >> "$LOG"; case "$line" in GETPIN) %s;; *) echo OK;; esac; done'


class Played:
    """A shell script in the place of pinentry."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, folder / "log"

    def way(self, script: str) -> Pinentry:
        path = self._folder / "pinentry"
        path.write_text(f"#!/bin/sh\necho $$ > {self._folder}/pid\nLOG={self._log}\n{script}\n")
        path.chmod(0o755)
        return Pinentry(str(path), {**os.environ, "DISPLAY": ":0"})

    def on_getpin(self, script: str) -> Pinentry:
        return self.way(FRAME % script)

    @property
    def heard(self) -> list[str]:
        return self._log.read_text().splitlines()

    def gone(self) -> bool:
        """Whether nothing is left of its process group."""
        try:
            os.killpg(int((self._folder / "pid").read_text()), 0)
        except ProcessLookupError:
            return True
        return False


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


@contextlib.contextmanager
def turn(seconds: float = PATIENCE) -> Iterator[Turn]:
    one = Turn(seconds)
    try:
        yield one
    finally:
        one.close()


def asked(way: Pinentry, seconds: float = PATIENCE) -> bytearray:
    with turn(seconds) as one:
        return way.ask(QUESTION, one)


@pytest.mark.parametrize(
    ("script", "pin"),
    [
        ("echo 'D 271828'; echo OK", b"271828"),
        ("echo 'D 27%25%0A18%c3%a4'; echo OK", "27%\n18ä".encode()),
        ("printf 'D 27'; sleep 0.05; printf '1828\\nO'; sleep 0.05; printf 'K thanks\\n'", b"271828"),
        ("printf 'S PASSWORD_FROM_CACHE\\n# a word\\n#\\nD 27\\nD 1828\\nOK\\n'", b"271828"),
        (f"echo 'D {'7' * MAX_PIN}'; echo OK", b"7" * MAX_PIN),
    ],
)
def test_the_pin_that_pinentry_returns_is_decoded(played: Played, script: str, pin: bytes) -> None:
    assert asked(played.on_getpin(script)) == pin
    assert "SETDESC PIN of the 100%25 card%0AToken: card%0AFor: cat (pid 1)" in played.heard
    assert "SETTITLE upcall" in played.heard
    assert "SETPROMPT PIN:" in played.heard
    assert f"SETTIMEOUT {int(PATIENCE) - 2}" in played.heard
    until(played.gone, "its processes are gone")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'ERR 83886179 Operation cancelled <Pinentry>'", Cancelled),
        ("echo 'ERR 83886278 fully cancelled'", Cancelled),
        ("echo 'ERR 83886142 Timeout <Pinentry>'", Unanswered),
        ("echo 'ERR 83918950 Inappropriate ioctl for device'", Unavailable),
        ("echo 'ERR'", Unavailable),
        ("echo 'ERR many'", Unavailable),
        ("echo OK", Cancelled),  # an empty PIN is no answer
        ("echo 'D 1234'; exit", Unavailable),
        ("echo 'D 12%'; echo OK", Unavailable),
        ("echo 'D 12%zz'; echo OK", Unavailable),
        ("echo 'D 12%+1'; echo OK", Unavailable),
        ("echo 'INQUIRE QUALITY 12'", Unavailable),
        ("echo 271828", Unavailable),
        ("echo OKAY", Unavailable),
        ("echo", Unavailable),
        (f"echo 'D {'7' * (MAX_PIN + 1)}'; echo OK", Unavailable),
        ("head -c 2000 /dev/zero", Unavailable),
        ("while echo 'S all is well'; do :; done", Unavailable),
        ("while echo 'D 7'; do :; done", Unavailable),
    ],
)
def test_each_failure_of_pinentry_has_its_error(played: Played, script: str, error: type[Exception]) -> None:
    """At once: the person would have an hour."""
    way = played.on_getpin(script)
    with pytest.raises(error) as caught:
        in_time(lambda: asked(way, HOUR), "no PIN")
    assert "271828" not in str(caught.value)
    until(played.gone, "its processes are gone")


@pytest.mark.parametrize("script", ["exit 1", "echo ERR 1 no", "kill -9 $$", "cat /dev/zero", "exec true"])
def test_a_pinentry_that_fails_at_its_start_is_unavailable(played: Played, script: str) -> None:
    with pytest.raises(Unavailable):
        asked(played.way(script))
    until(played.gone, "its processes are gone")


@pytest.mark.parametrize("script", ["sleep 3600", "trap '' TERM; sleep 3600", "echo OK; sleep 3600 & sleep 3600"])
def test_a_pinentry_that_hangs_is_killed_with_its_children(played: Played, script: str) -> None:
    """It is killed with all that it has started."""
    way = played.way(script)
    with pytest.raises(Unanswered):
        in_time(lambda: asked(way, 1.5), "its time is over")
    until(played.gone, "its processes are gone")


def test_a_pinentry_that_hangs_is_killed_when_the_question_is_withdrawn(played: Played) -> None:
    way = played.on_getpin("sleep 100")
    with turn() as one, ThreadPoolExecutor() as pool:
        answer = pool.submit(way.ask, QUESTION, one)
        until(lambda: played._log.exists() and "GETPIN" in played.heard, "it is asked")
        one.withdraw()
        with pytest.raises(Withdrawn):
            answer.result(PATIENCE)
    until(played.gone, "its processes are gone")


def test_a_long_text_is_cut_between_characters_and_between_escapes(played: Played) -> None:
    way = played.on_getpin("echo 'D 1234'; echo OK")
    with turn() as one:
        assert way.ask(Question("ä%" * 2000, ()), one) == b"1234"
    (line,) = (line for line in played.heard if line.startswith("SETDESC"))
    assert 990 < len(line.encode()) < 1000
    assert set(line.removeprefix("SETDESC ").replace("%25", "%")) == {"ä", "%"}
    assert escaped("a\r\n%", 100) == b"a%0D%0A%25"


def test_pinentry_is_available_only_with_a_program_and_a_screen_or_terminal(tmp_path: Path, played: Played) -> None:
    path = {"PATH": os.environ["PATH"]}
    there = str(tmp_path / "pinentry")
    played.way("exit")
    assert Pinentry(there, {**path, "WAYLAND_DISPLAY": "wayland-0"}).available()
    assert not Pinentry(there, path).available()
    assert not Pinentry(there, {**path, "GPG_TTY": "/dev/pts/99999"}).available()
    assert not Pinentry(there, {**path, "GPG_TTY": "not a tty"}).available()
    assert not Pinentry(there, {**path, "GPG_TTY": there}).available()
    assert not Pinentry("/nowhere/pinentry", {**path, "DISPLAY": ":0"}).available()
    assert Pinentry(None, {"PATH": str(tmp_path), "DISPLAY": ":0"}).available()
    assert not Pinentry(None, {"PATH": str(tmp_path / "other"), "DISPLAY": ":0"}).available()


def test_a_notice_is_shown_without_asking_for_a_pin(played: Played) -> None:
    way = played.on_getpin("exit 1")
    with turn() as one:
        assert way.notify(QUESTION, one)
    assert "MESSAGE" in played.heard
    assert "GETPIN" not in played.heard
    with turn(0.2) as one:
        assert played.way("echo OK; sleep 100").notify(QUESTION, one)  # until its time is over
    until(played.gone, "its processes are gone")
    assert not Pinentry("/bin/true", {"GPG_TTY": "/dev/tty"}).notify(QUESTION, one)  # a terminal is not taken away


# --- a real one ------------------------------------------------------------------------------------------------


class OnTerminal:
    """A real pinentry on a terminal that the test types on."""

    def __init__(self, program: str) -> None:
        self.master, self._slave = os.openpty()
        environment = {**os.environ, "GPG_TTY": os.ttyname(self._slave), "TERM": "vt100", "LC_ALL": "C"}
        environment.pop("DISPLAY", None)
        self.way = Pinentry(program, environment)
        self._pool = ThreadPoolExecutor()
        self._before = termios.tcgetattr(self._slave)
        self.turn = Turn(PATIENCE)
        self.answer = self._pool.submit(self.way.ask, QUESTION, self.turn)
        self.seen = b""

    def expect(self, words: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        while words not in self.seen:
            if not select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise NotInTime(f"{words!r} is not to be seen in {self.seen!r}")
            self.seen += os.read(self.master, 4096)

    def type(self, keys: bytes) -> None:
        """Once it listens: what is typed before is dropped."""
        until(lambda: termios.tcgetattr(self._slave)[3] != self._before[3], "it reads unseen")
        os.write(self.master, keys)

    def close(self) -> None:
        self.turn.withdraw()
        self._pool.shutdown()
        self.turn.close()
        os.close(self._slave)
        os.close(self.master)


@pytest.fixture(params=["pinentry-tty", "pinentry-curses"])
def real(request: pytest.FixtureRequest) -> Iterator[OnTerminal]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed (Debian: {request.param})")
    there = OnTerminal(request.param)
    yield there
    there.close()


def test_a_real_pinentry_returns_the_pin_typed_unseen(real: OnTerminal) -> None:
    real.expect(b"PIN:")
    real.type(b"27%1828\r")
    assert real.answer.result(PATIENCE) == b"27%1828"
    assert b"PIN of the 100% card" in real.seen
    assert b"27%1828" not in real.seen


def test_a_cancelled_real_pinentry_cancels_the_question(real: OnTerminal) -> None:
    real.expect(b"PIN:")
    real.type(b"\x03" if "tty" in str(real.way._path) else b"\t\t\r")
    with pytest.raises(Cancelled):
        real.answer.result(PATIENCE)


def test_a_withdrawn_question_ends_a_real_pinentry(real: OnTerminal) -> None:
    real.expect(b"PIN:")
    before = threading.active_count()
    real.turn.withdraw()
    with pytest.raises(Withdrawn):
        real.answer.result(PATIENCE)
    assert threading.active_count() <= before
