"""Shows the daemon's prompts on a terminal, for `upcall prompt`: the peer of upcall.daemon.prompting.agent."""

from __future__ import annotations

import os
import select
import socket
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from upcall.core.errors import PeerError, UpcallError
from upcall.daemon.prompting.question import MAX_PIN
from upcall.daemon.prompting.requester import plain
from upcall.wire.isolation import ANSWER, CLOSE, FAILED, MAX_MESSAGE, PIN, REFUSED, TOUCH, ChildMessage, pack, take

_LINE = 4096  # bytes: the longest line of a terminal in canonical mode (termios(3))
_WORD = 32  # characters of "PIN" or "Passphrase", at most
_NO = 0x03  # Ctrl-C
_HANG_UP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Ended(UpcallError):
    """The daemon sends no more prompts to this terminal. The text is the reason, for people."""


class TerminalGone(Ended):
    """The terminal was closed. An open prompt stays unanswered."""


class Terminal:
    """Shows the daemon's prompts on a terminal, one at a time, and sends what is typed."""

    def __init__(self, fd: int, connection: socket.socket) -> None:
        """`fd`: the terminal, open for reading and writing. `connection`: to the daemon."""
        self._fd, self._connection = fd, connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def run(self) -> None:
        """Serves prompts until Ctrl-C between two prompts (KeyboardInterrupt), or Ended. Blocks."""
        self._poll.register(self._fd, 0)  # ignores input between prompts; detects hang-up only
        while True:
            self._wait()
            message = self._receive()
            if message.kind == PIN:
                self._prompt(message)
            else:
                self._other(message)

    def _wait(self) -> bool:
        """Waits. Returns True if a line was typed, False if a message has arrived."""
        ready = dict(self._poll.poll())
        if ready.get(self._fd, 0) & _HANG_UP:
            raise TerminalGone("the terminal has gone")
        return bool(ready.get(self._fd, 0) & select.POLLIN)

    def _receive(self) -> ChildMessage:
        try:
            data = self._connection.recv(MAX_MESSAGE)
            if not data:
                raise Ended("the daemon has ended")
            return take(data)
        except OSError as error:
            raise Ended(f"the daemon has gone: {error.strerror}") from None

    def _other(self, message: ChildMessage) -> None:
        if message.kind == FAILED:
            raise Ended(message.text)
        if message.kind == TOUCH:
            self._write("\n" + _text(message) + "\n")
        elif message.kind != CLOSE:  # CLOSE: withdraws a prompt that was answered meanwhile
            raise PeerError("prompt", f"the daemon says {message.kind}")

    def _write(self, text: str) -> None:
        os.write(self._fd, text.encode("utf-8", "backslashreplace"))

    def _send(self, message: ChildMessage) -> None:
        data = pack(message)
        try:
            self._connection.send(data)
        except OSError as error:
            raise Ended(f"the daemon has gone: {error.strerror}") from None
        finally:
            data[:] = bytes(len(data))

    # --- one prompt ----------------------------------------------------------------------------------------

    def _prompt(self, asked: ChildMessage) -> None:
        if os.tcgetpgrp(self._fd) != os.getpgrp():  # changing the terminal would raise SIGTTOU
            self._send(ChildMessage(FAILED, asked.id, text="upcall prompt is in the background of its terminal"))
            return
        self._write(f"\n{_text(asked)}\n")
        buffer = bytearray(_LINE)
        try:
            with self._hidden():
                size = self._read(asked.id, plain(asked.text, _WORD) or "PIN", buffer)
            if size is None:
                self._write("too late: nobody waits for it any more\n")
            elif not size:
                self._send(ChildMessage(REFUSED, asked.id, text="locked"))
                self._write("refused\n")
            else:
                with memoryview(buffer)[:size] as view:
                    secret = bytearray(view)
                self._send(ChildMessage(ANSWER, asked.id, data=secret))
                secret[:] = bytes(len(secret))
        finally:
            buffer[:] = bytes(len(buffer))

    def _read(self, number: int, wanted: str, buffer: bytearray) -> int | None:
        """Reads a line into the buffer. Returns its size; 0: cancelled; None: withdrawn by the daemon."""
        size = 0
        self._write(f"{wanted}: ")
        try:
            while True:
                if not self._wait():
                    message = self._receive()
                    if message.kind == CLOSE and message.id == number:
                        return None
                    self._other(message)
                    self._write(f"{wanted}: ")
                    continue
                with memoryview(buffer)[size:] as room:
                    count = os.readv(self._fd, [room])
                size += count
                if not count or buffer[size - 1] == _NO:
                    return 0
                ended = buffer[size - 1] == 0x0A
                size -= ended
                if ended and size <= MAX_PIN:
                    return size
                if ended or size == len(buffer):
                    buffer[:], size = bytes(len(buffer)), 0
                    self._write(f"\nThat is longer than {MAX_PIN} bytes. {wanted}: ")
        except OSError:
            raise TerminalGone("the terminal has gone") from None

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Disables echo and signal keys: a signal could end the process before the terminal is restored. Ctrl-C ends a
        line instead."""
        try:
            before = termios.tcgetattr(self._fd)
            hidden = termios.tcgetattr(self._fd)
            hidden[3] &= ~(termios.ECHO | termios.ISIG)  # the fourth field holds the local modes, the last the keys
            hidden[6][termios.VEOL] = bytes([_NO])
            self._poll.modify(self._fd, select.POLLIN)
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, hidden)
        except termios.error:
            raise TerminalGone("the terminal has gone") from None
        try:
            yield
        finally:
            self._poll.modify(self._fd, 0)
            try:
                termios.tcsetattr(self._fd, termios.TCSAFLUSH, before)
                self._write("\n")
            except (termios.error, OSError):
                raise TerminalGone("the terminal has gone") from None


def _text(message: ChildMessage) -> str:
    return str(message.data, "utf-8", "replace")
