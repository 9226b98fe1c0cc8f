"""Writes notices to a user's terminals: all that accept messages (mesg y), or the one that was used last.

Terminals are found by their owner, not by utmp, which few programs still write. Names cannot inject escape sequences,
and a terminal that is blocked does not block the sink.
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

MOST: Final = 16  # limit of terminals of one user
ALL, LAST = WHICH = ("all", "last")

_NAMES: Final = re.compile(r"tty[A-Za-z]*[0-9]+|hvc[0-9]+")  # in /dev: consoles, serial lines
_OPEN: Final = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_IUTF8: Final = 0o40000  # bit of c_iflag: the terminal uses UTF-8 (termios(3))


class Found(NamedTuple):
    """A terminal, and the time of its last input."""

    path: str
    used: float


class Terminal:
    """A sink that writes to the terminals of one user: `uid`; None: the user whom the notice is for."""

    def __init__(self, uid: int | None, which: str = ALL, devices: Path = Path("/dev")) -> None:
        self._uid, self._which, self._devices = uid, which, devices
        self._writers = _tty_group()

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        """Writes a notice. ModuleFailed, permanent, if no terminal accepted it: a notice is of no use later."""
        uid = person(notice)[0] if self._uid is None else self._uid
        found = sorted(terminals(uid, self._writers, self._devices), key=lambda one: -one.used)
        if not found:
            raise ModuleFailed(f"uid {uid} has no terminal that takes messages; `mesg y` in one allows them")
        # A daemon started on one of these terminals is in the background there: SIGTTOU would stop it (stty tostop).
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        failures = [self._write(one.path, uid, f"{headline(notice)}: {text}") for one in self._chosen(found)]
        if all(failures):
            raise ModuleFailed("no terminal takes it: " + ", ".join(filter(None, failures)))

    def _chosen(self, found: list[Found]) -> list[Found]:
        return found[: 1 if self._which == LAST else MOST]

    def _write(self, path: str, uid: int, text: str) -> str:
        """Writes to one terminal. Returns why that failed; "" if it did not."""
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
    """Returns the bytes of a line. ASCII only unless the terminal uses UTF-8: in other encodings, bytes of a character
    may be control characters."""
    encoded = printable(text).encode("utf-8") if utf8 else printable(text).encode("ascii", "backslashreplace")
    return b"\r\n" + encoded + b"\r\n"


def terminals(uid: int, writers: int, devices: Path = Path("/dev")) -> Iterator[Found]:
    """Yields the terminals of this user that accept messages. `writers`: the group tty."""
    for folder, names in ((devices / "pts", re.compile("[0-9]+")), (devices, _NAMES)):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if names.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        found = entry.stat(follow_symlinks=False)
                        if _takes_messages(found, uid, writers):
                            yield Found(entry.path, found.st_atime)


def _takes_messages(found: os.stat_result, uid: int, writers: int) -> bool:
    """Returns whether a terminal accepts messages, as write(1) and wall(1) decide: the group tty may write to it."""
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
        return 5  # its usual number


class TerminalModule:
    name = "terminal"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Terminal(None if machine.is_ours() else os.geteuid(), settings.get("which", ALL))


sink = TerminalModule()
