"""Prompts by systemd's password agents: a question is a file in a folder that they watch, the answer a datagram.

Source: systemd's "Password Agents" specification. The `systemd-ask-password` command is not used: it copies the secret
through buffers of its own to a pipe, shows the question in its arguments to every user, and may not be installed
although a desktop's agent is.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Question, Turn, Unavailable, checked
from upcall.kernel import ucred

SYSTEM: Final = Path("/run/systemd/ask-password")
_DATAGRAM: Final = 1 + 4 * MAX_PIN
_TRIES: Final = 64  # datagrams from unexpected senders that are skipped, at most


def folder(environment: Mapping[str, str]) -> Path | None:
    """Returns the folder that agents watch: the user's own (systemd 257), otherwise the system's, if it is writable:
    only root can write to it. None without one.

    The first agent creates the folder, so without a folder there is no agent. The reverse is not known.
    """
    own = environment.get("XDG_RUNTIME_DIR")
    places = [Path(own) / "systemd" / "ask-password"] if own else []
    if os.geteuid() == 0:
        places.append(SYSTEM)
    return next((place for place in places if _ours(place)), None)


def _ours(place: Path) -> bool:
    try:
        found = place.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022 and place.is_dir()


class PasswordAgents:
    """A `Way` by systemd's password agents. Tried last, because it cannot tell whether an agent runs."""

    name = "systemd"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def available(self) -> bool:
        return folder(self._environment) is not None

    def ask(self, question: Question, turn: Turn, /) -> bytearray:
        place = folder(self._environment)
        if place is None:
            raise Unavailable("no password agent has run here")
        name = os.urandom(8).hex()
        answers, asked = place / f"sck.{name}", place / f"ask.{name}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as listener:
                listener.setblocking(False)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                listener.bind(os.fspath(answers))
                answers.chmod(0o600)
                _write(asked, _ask_file(question, answers, turn))
                return checked(_answer(listener, turn))
        except OSError as error:
            raise Unavailable(f"{place}: {error.strerror}") from None
        finally:
            for path in (asked, answers):  # removing the file tells the agents to close the prompt
                with contextlib.suppress(OSError):
                    path.unlink()

    def notify(self, question: Question, turn: Turn, /) -> bool:
        """Returns False: agents cannot show notices."""
        return False


def _ask_file(question: Question, answers: Path, turn: Turn) -> str:
    message = question.text("; ")  # one line, printable: cannot inject a line into the file
    return (
        f"[Ask]\nPID={os.getpid()}\nSocket={answers}\nAcceptCached=0\nEcho=0\nNotAfter={int(turn.until * 1e6)}\n"
        f"Silent=0\nMessage={message}\nIcon=dialog-password\nId=upcall\n"
    )


def _write(path: Path, text: str) -> None:
    """Creates a file atomically: agents read it as soon as it has its name."""
    beside = path.with_name(f"tmp.{path.name.removeprefix('ask.')}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode("utf-8", "replace"))
    finally:
        os.close(fd)
    beside.rename(path)


def _answer(listener: socket.socket, turn: Turn) -> bytearray:
    """Returns the first answer from root or this user. Others are ignored: any user may send to the socket."""
    buffer = bytearray(_DATAGRAM)
    try:
        for _ in range(_TRIES):
            turn.wait(listener.fileno())
            size, ancillary, flags, _ = listener.recvmsg_into([buffer], ucred.SPACE)
            sender = ucred.of_message(ancillary)
            if flags & socket.MSG_TRUNC or not size or sender is None or sender.uid not in (0, os.geteuid()):
                continue
            if buffer[0] == 0x2D:  # "-"
                raise Cancelled("the person said no")
            if buffer[0] == 0x2B:  # "+", then one secret or more, each NUL-terminated
                end = buffer.find(b"\0", 1, size)
                return buffer[1 : end if end >= 0 else size]
        raise Unavailable("too many answers from others")
    finally:
        buffer[:] = bytes(len(buffer))
