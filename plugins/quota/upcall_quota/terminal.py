"""The person's terminals: every tty that is theirs and takes messages (mesg y), or the one that was used last.

They are found by their owner, not in utmp, which few programs write any more. Nothing that a name holds reaches the
terminal as an order, and a terminal that does not drain costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import signal
import stat
import termios
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.core.errors import ModuleFailed
from upcall.process import machine
from upcall.protocols.quota.notice import QuotaNotice, printable
from upcall.sink import Sink
from upcall_quota.words import headline, person

MOST: Final = 16  # terminals of one person: more would be spread over a wall
ALL, LAST = WHICH = ("all", "last")

_NAMES: Final = re.compile(r"tty[A-Za-z]*[0-9]+|hvc[0-9]+")  # in /dev: consoles, serial lines
_OPEN: Final = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_IUTF8: Final = 0o40000  # of c_iflag: this terminal speaks UTF-8 (termios(3))


class Found(NamedTuple):
    """A terminal, and when somebody last typed there."""

    path: str
    used: float


class Terminal:
    """Writes to the terminals of one user: `uid`, or if that is None, of whom the notice is for."""

    def __init__(self, uid: int | None, which: str = ALL, devices: Path = Path("/dev")) -> None:
        self._uid, self._which, self._devices = uid, which, devices
        self._writers = _tty_group()

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        """ModuleFailed if no terminal has taken it: nobody will be there later to whom this is news."""
        uid = person(notice)[0] if self._uid is None else self._uid
        found = sorted(terminals(uid, self._writers, self._devices), key=lambda one: -one.used)
        if not found:
            raise ModuleFailed(f"uid {uid} has no terminal that takes messages")
        # A daemon that was started in one of them is no foreground process there: SIGTTOU would stop it (stty tostop).
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        failures = [self._write(one.path, uid, f"{headline(notice)}: {text}") for one in self._chosen(found)]
        if all(failures):
            raise ModuleFailed("no terminal takes it: " + ", ".join(filter(None, failures)))

    def _chosen(self, found: list[Found]) -> list[Found]:
        return found[: 1 if self._which == LAST else MOST]

    def _write(self, path: str, uid: int, text: str) -> str:
        """Empty, or why not."""
        try:
            fd = os.open(path, _OPEN)
        except OSError as error:
            return f"{path}: {error.strerror}"
        try:
            if not _takes_messages(os.fstat(fd), uid, self._writers) or not os.isatty(fd):
                return f"{path}: is no terminal of uid {uid} any more"
            os.write(fd, _line(text, bool(termios.tcgetattr(fd)[0] & _IUTF8)))
        except (OSError, termios.error) as error:
            code = error.args[0]
            return f"{path}: {'does not drain' if code == errno.EAGAIN else os.strerror(code)}"
        finally:
            os.close(fd)
        return ""


def _line(text: str, utf8: bool) -> bytes:
    """A line of its own. In another encoding than UTF-8, bytes of a harmless character can be control characters."""
    encoded = printable(text).encode("utf-8") if utf8 else printable(text).encode("ascii", "backslashreplace")
    return b"\r\n" + encoded + b"\r\n"


def terminals(uid: int, writers: int, devices: Path = Path("/dev")) -> Iterator[Found]:
    """The terminals of this user that take messages."""
    for folder, names in ((devices / "pts", re.compile("[0-9]+")), (devices, _NAMES)):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if names.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        found = entry.stat(follow_symlinks=False)
                        if _takes_messages(found, uid, writers):
                            yield Found(entry.path, found.st_atime)


def _takes_messages(found: os.stat_result, uid: int, writers: int) -> bool:
    """As write(1) and wall(1) see it: the group tty may write."""
    return (
        stat.S_ISCHR(found.st_mode)
        and found.st_uid == uid
        and found.st_gid == writers
        and bool(found.st_mode & stat.S_IWGRP)
    )


def _tty_group() -> int:
    try:
        return grp.getgrnam("tty").gr_gid
    except KeyError:
        return 5  # what it is everywhere


class TerminalModule:
    name = "terminal"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Terminal(None if machine.is_ours() else os.geteuid(), settings.get("which", ALL))


sink = TerminalModule()
