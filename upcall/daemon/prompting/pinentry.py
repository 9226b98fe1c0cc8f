"""Prompts by GnuPG's pinentry, on a desktop or terminal: one process per question.

Source: the Assuan protocol (info assuan, "Client requests" and "Server responses") and pinentry's manual (info
pinentry, "Protocol"). Lines of at most 1000 bytes; `%`, CR and LF are percent-escaped; D lines carry what was typed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Question, Turn, Unanswered, Unavailable, checked

_LINE: Final = 1000  # bytes, with the newline
_LINES: Final = 100  # limit of lines that one dialog may write
_PARTING: Final = 1.0  # seconds for the dialog to restore the terminal before it is killed
_CANCELLED: Final = frozenset({99, 114, 198})  # GPG_ERR_CANCELED, NOT_CONFIRMED, FULLY_CANCELED of libgpg-error
_TIMEOUT: Final = 62  # GPG_ERR_TIMEOUT
_CODE: Final = 0xFFFF  # mask of the code in a libgpg-error number; the higher bits name the source


class Pinentry:
    """A `Way` by pinentry. Needs a display, or the terminal of GPG_TTY, in the daemon's environment."""

    name = "pinentry"

    def __init__(self, path: str | None, environment: Mapping[str, str]) -> None:
        """`path`: the program; None: `pinentry` in PATH."""
        self._path, self._environment = path, environment

    def _program(self) -> str | None:
        """Does what shutil.which does, without shutil: it would load three compression libraries into the daemon."""
        name = self._path or "pinentry"
        folders = [""] if "/" in name else os.get_exec_path(dict(self._environment))
        found = (os.path.join(folder, name) for folder in folders)  # noqa: PTH118
        return next((path for path in found if os.access(path, os.X_OK) and Path(path).is_file()), None)

    def _display(self) -> bool:
        return bool(self._environment.get("DISPLAY") or self._environment.get("WAYLAND_DISPLAY"))

    def _terminal(self) -> str | None:
        """Returns the path of the terminal in GPG_TTY; None if it has been closed."""
        name = self._environment.get("GPG_TTY", "")
        try:
            return name if name.startswith("/dev/") and stat.S_ISCHR(Path(name).stat().st_mode) else None
        except OSError:
            return None

    def available(self) -> bool:
        return (self._display() or self._terminal() is not None) and self._program() is not None

    def ask(self, question: Question, turn: Turn, /) -> bytearray:
        with self._start(question, turn) as dialog:
            dialog.say(f"SETPROMPT {question.wanted}:")
            return checked(dialog.say("GETPIN"))

    def notify(self, question: Question, turn: Turn, /) -> bool:
        """Shows a notice on a display only: on a terminal it would occupy the terminal until a key is pressed."""
        if not self._display():
            return False
        with contextlib.suppress(Cancelled, Unanswered), self._start(question, turn) as dialog:
            dialog.say("MESSAGE")
        return True

    def _start(self, question: Question, turn: Turn) -> _Dialog:
        program, terminal = self._program(), self._terminal()
        if program is None:
            raise Unavailable("there is no pinentry")
        dialog = _Dialog(program, self._environment, turn)
        try:
            dialog.reply()  # its greeting
            if terminal is not None:
                dialog.say(f"OPTION ttyname={terminal}")
                dialog.say(f"OPTION ttytype={self._environment.get('TERM', 'dumb')}")
            if "LC_CTYPE" in self._environment or "LANG" in self._environment:
                dialog.try_to_say(
                    f"OPTION lc-ctype={self._environment.get('LC_CTYPE', self._environment.get('LANG'))}"
                )
            # Ends by itself and restores the terminal before it is killed; 0 would mean no time-out.
            dialog.try_to_say(f"SETTIMEOUT {max(1, int(turn.left()) - 1)}")
            dialog.say("SETTITLE upcall")
            dialog.say("SETDESC", question.text())
        except BaseException:
            dialog.close()
            raise
        return dialog


class _Dialog:
    """A pinentry process, in a session of its own: it gets its terminal by name, and is killed with its children."""

    def __init__(self, program: str, environment: Mapping[str, str], turn: Turn) -> None:
        self._turn = turn
        self._buffer = bytearray(_LINE)
        self._size = self._lines = 0
        try:
            self._process = subprocess.Popen(
                [program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise Unavailable(f"{program}: {error.strerror}") from None

    def say(self, command: str, text: str = "") -> bytearray:
        """Sends a command. Returns the data of the response; the caller wipes it. Cancelled, Unanswered, Withdrawn,
        Unavailable."""
        line = command.encode() + (b" " + escaped(text, _LINE - len(command) - 2) if text else b"") + b"\n"
        if self._process.stdin is None:
            raise Unavailable("no way to talk to it")
        try:
            self._process.stdin.write(line)  # all lines together are shorter than the pipe
        except OSError:
            raise Unavailable("it has ended") from None
        return self.reply()

    def try_to_say(self, line: str) -> None:
        """Sends a command that older versions may not know. Ignores an error."""
        with contextlib.suppress(_Error):
            self.say(line)

    def reply(self) -> bytearray:
        """Reads D lines until OK or ERR. Returns their data; the caller wipes it."""
        data = bytearray(MAX_PIN + 1)
        size = 0
        try:
            while True:
                with self._line() as line:
                    kind = bytes(line[:4]).partition(b" ")[0]
                    if kind == b"OK":
                        return data[:size]
                    if kind == b"ERR":
                        raise _error(bytes(line[4:24]))
                    if kind == b"D":
                        size += _unescape(line[2:], data, size)
                    elif kind != b"S" and not kind.startswith(b"#"):
                        raise Unavailable("it talks nonsense")
        finally:
            data[:] = bytes(len(data))

    def _line(self) -> _Line:
        """Reads the next line, as a context manager that wipes it at its end."""
        self._lines += 1
        if self._lines > _LINES:
            raise Unavailable("it talks without end")
        output = self._process.stdout
        if output is None:
            raise Unavailable("no way to hear it")
        while (end := self._buffer.find(b"\n", 0, self._size)) < 0:
            if self._size == len(self._buffer):
                raise Unavailable("it talks nonsense: a line too long")
            self._turn.wait(output.fileno())
            with memoryview(self._buffer)[self._size :] as room:
                count = os.readv(output.fileno(), [room])
            if not count:
                raise Unavailable("it has ended")
            self._size += count
        return _Line(self, end)

    def done(self, end: int) -> None:
        """Wipes the line that ends at offset `end`, and moves the rest of the buffer to its start."""
        rest = self._size - end - 1
        self._buffer[:rest] = self._buffer[end + 1 : self._size]
        self._buffer[rest:] = bytes(len(self._buffer) - rest)
        self._size = rest

    def peek(self, end: int) -> memoryview:
        return memoryview(self._buffer)[:end]

    def close(self) -> None:
        """Ends the process: sends BYE first, so that it restores the terminal, then kills it."""
        self._buffer[:] = bytes(len(self._buffer))
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(OSError):  # without a free descriptor, it is killed at once
            _wait_for_end(process.pid, _PARTING)
        with contextlib.suppress(PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # kills its children before the pid can be reused
        process.wait()

    def __enter__(self) -> _Dialog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wait_for_end(pid: int, seconds: float) -> None:
    """Waits for the end of a process without reaping it."""
    watch = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(watch)


class _Line:
    """A line in the dialog's buffer."""

    def __init__(self, dialog: _Dialog, end: int) -> None:
        self._dialog, self._end, self._view = dialog, end, dialog.peek(end)

    def __enter__(self) -> memoryview:
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._dialog.done(self._end)


class _Error(Unavailable):
    """pinentry has answered with an error."""


def _error(text: bytes) -> Exception:
    """Translates a line `ERR number words` to an exception. The words are dropped: they are not trusted."""
    number = text.split(b" ", 1)[0]
    if not number.isdigit():
        return Unavailable("it talks nonsense")
    code = int(number) & _CODE
    if code in _CANCELLED:
        return Cancelled("the person said no")
    if code == _TIMEOUT:
        return Unanswered("not answered in time")
    return _Error(f"error {code}")


def escaped(text: str, room: int) -> bytes:
    """Escapes a text and truncates it to `room` bytes, without splitting a character or an escape."""
    found = bytearray()
    for character in text:
        more = {"%": b"%25", "\r": b"%0D", "\n": b"%0A"}.get(character) or character.encode("utf-8", "replace")
        if len(found) + len(more) > room:
            break
        found += more
    return bytes(found)


def _unescape(source: memoryview, target: bytearray, at: int) -> int:
    """Unescapes the data of a D line into `target`, from offset `at`. Returns the number of bytes."""
    size, index = 0, 0
    while index < len(source):
        byte = source[index]
        if byte == 0x25:
            digits = bytes(source[index + 1 : index + 3])
            if len(digits) != 2 or digits.strip(b"0123456789abcdefABCDEF"):
                raise Unavailable("it talks nonsense: an escape")
            byte, index = int(digits, 16), index + 2
        if at + size >= len(target):
            raise Unavailable(f"a PIN of more than {MAX_PIN} bytes")
        target[at + size] = byte
        size, index = size + 1, index + 1
    return size
