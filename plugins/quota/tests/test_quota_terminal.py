"""Real terminals: which of them get the text, and what cannot get in with it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upcall_quota.terminal import LAST, Terminal, _tty_group, sink

from upcall.core.errors import ModuleFailed
from upcall.protocols.quota.notice import Cause, Subject, sentence
from upcall.testing.notices import hostile, notice
from upcall.testing.processes import in_child, in_time, until

UID = os.geteuid()
IUTF8 = 0o40000


class Pty:
    """A terminal, and the person in front of it."""

    def __init__(self, mode: int = 0o620, utf8: bool = True, uid: int = UID) -> None:
        self.master, self.slave = pty.openpty()
        self.path = os.ttyname(self.slave)
        try:
            os.chown(self.path, uid, _tty_group())
        except PermissionError:
            if Path(self.path).stat().st_gid != _tty_group():
                pytest.skip("/dev/pts is mounted without gid=5, and we are not root")
        Path(self.path).chmod(mode)
        tty.setraw(self.slave)
        attributes = termios.tcgetattr(self.slave)
        attributes[0] = attributes[0] | IUTF8 if utf8 else attributes[0] & ~IUTF8
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)

    def shown(self) -> bytes:
        """What is on it now."""
        if not select.select([self.master], [], [], 0)[0]:
            return b""
        return os.read(self.master, 65536)

    def close(self) -> None:
        for fd in (self.master, self.slave):
            os.close(fd)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Pty]]:
    made: list[Pty] = []

    def make(mode: int = 0o620, utf8: bool = True, uid: int = UID) -> Pty:
        made.append(Pty(mode, utf8, uid))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_every_terminal_of_the_person_shows_it(terminal: Callable[..., Pty]) -> None:
    mine = [terminal(), terminal()]
    Terminal(UID).tell(notice(UID), "Your files are too many.")
    for one in mine:
        assert one.shown() == b"\r\nQuota used up: Your files are too many.\r\n"


def test_last_writes_to_the_terminal_that_was_used_last_only(terminal: Callable[..., Pty]) -> None:
    mine = [terminal(), terminal(), terminal()]
    for one, age in zip(mine, (30, 10, 20), strict=True):
        os.utime(one.path, (time.time() - age, time.time()))
    Terminal(UID, LAST).tell(notice(UID), "text")
    assert [bool(one.shown()) for one in mine] == [False, True, False]


def test_mesg_n_is_respected(terminal: Callable[..., Pty]) -> None:
    quiet, open_to_all = terminal(mode=0o600), terminal(mode=0o620)
    Terminal(UID).tell(notice(UID), "text")
    assert quiet.shown() == b""
    assert open_to_all.shown()


def test_a_uid_without_a_terminal_is_a_failure(terminal: Callable[..., Pty], tmp_path: Path) -> None:
    terminal(mode=0o600)
    with pytest.raises(ModuleFailed, match="uid 4242 has no terminal that takes messages"):
        Terminal(4242).tell(notice(UID), "text")
    with pytest.raises(ModuleFailed, match="has no terminal"):
        Terminal(UID, devices=tmp_path / "none").tell(notice(UID), "text")


def test_no_name_sends_control_characters_to_the_terminal(terminal: Callable[..., Pty]) -> None:
    mine = terminal()
    told = hostile(UID)
    for text in (sentence(told, time.time()), "raw \x1b[2J\x9b31m\u202e\u2066\r\n\x07\ud800", f"{told!s} {told!r}"):
        Terminal(UID).tell(told, text)
        shown = mine.shown()
        assert shown.startswith(b"\r\n")
        assert shown.endswith(b"\r\n")
        line = shown[2:-2].decode("utf-8")
        assert line.isprintable(), "no control characters, no bidi overrides, no line separators"
        assert "\\x1b" in line


def test_only_ascii_reaches_a_terminal_without_utf8(terminal: Callable[..., Pty]) -> None:
    """The second byte of an u-umlaut in UTF-8 is harmless, that of a U-circumflex is CSI in Latin-1."""
    utf8, latin = terminal(), terminal(utf8=False)
    Terminal(UID).tell(notice(UID), "Û[2J")
    assert b"\xc3\x9b[2J" in utf8.shown()
    assert b"\\xdb[2J" in latin.shown()


def fill(one: Pty) -> None:
    """Until no more fits in: no process reads there."""
    fd = os.open(one.path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        while True:
            os.write(fd, b"x" * 4096)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def test_a_terminal_that_does_not_drain_is_not_waited_for(terminal: Callable[..., Pty]) -> None:
    stuck, stopped, good = terminal(), terminal(), terminal()
    fill(stuck)
    termios.tcflow(stopped.slave, termios.TCOOFF)  # Ctrl-S
    in_time(lambda: Terminal(UID).tell(notice(UID), "text"), "its end, while nobody makes room")
    assert b"text" in good.shown()
    for one in (stuck, good):
        Path(one.path).chmod(0o600)
    with pytest.raises(ModuleFailed, match=f"no terminal takes it: {stopped.path}: does not drain"):
        Terminal(UID).tell(notice(UID), "text")
    termios.tcflow(stopped.slave, termios.TCOON)


def test_what_is_no_terminal_is_not_written_to(terminal: Callable[..., Pty], tmp_path: Path) -> None:
    """A folder that somebody else could have filled, if that were possible in /dev/pts."""
    (tmp_path / "pts").mkdir()
    (tmp_path / "pts" / "0").write_bytes(b"")
    (tmp_path / "pts" / "1").symlink_to(terminal().path)
    os.mkfifo(tmp_path / "pts" / "2")
    with pytest.raises(ModuleFailed, match="has no terminal"):
        Terminal(UID, devices=tmp_path).tell(notice(UID), "text")
    assert (tmp_path / "pts" / "0").read_bytes() == b""


def test_the_systems_daemon_writes_to_the_owners_or_causes_terminal_only(terminal: Callable[..., Pty]) -> None:
    if UID != 0:
        pytest.skip("needs root")
    alice, bob = terminal(uid=5001), terminal(uid=5002)
    opened = sink.open({})
    opened.tell(notice(5001), "hers")
    assert (b"hers" in alice.shown(), bob.shown()) == (True, b"")
    opened.tell(notice(subject=Subject("group", 100, "users"), cause=Cause(5002, "bob")), "his")
    assert (alice.shown(), b"his" in bob.shown()) == (b"", True)


def test_a_daemon_in_the_background_of_its_terminal_is_not_stopped(terminal: Callable[..., Pty]) -> None:
    """stty tostop: a process that writes to its own terminal from the background gets SIGTTOU."""
    mine = terminal()
    attributes = termios.tcgetattr(mine.slave)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(mine.slave, termios.TCSANOW, attributes)

    def in_background() -> str:
        os.setsid()
        fcntl.ioctl(mine.slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)  # no foreground process any more
            code = 1
            try:
                Terminal(UID).tell(notice(UID), "from behind")
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "stopped"
        return "told" if status == 0 else f"failed {status}"

    assert in_child(in_background) == "told"
    until(lambda: b"from behind" in mine.shown(), "the text")
