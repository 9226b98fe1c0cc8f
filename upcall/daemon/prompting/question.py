"""Defines the interface of prompting methods: the question, its time-out, and its outcomes."""

from __future__ import annotations

import os
import select
import threading
import time
from typing import NamedTuple, Protocol

from upcall.core.errors import UpcallError

MAX_PIN = 256  # bytes of a PIN (tokens accept far less) or passphrase


class Unavailable(UpcallError):
    """This method is not available now; another one may be. The text is logged: no secrets in it."""


class Cancelled(UpcallError):
    """The person has cancelled the prompt."""


class Unanswered(UpcallError):
    """The prompt timed out."""


class Withdrawn(UpcallError):
    """The prompt was cancelled by the daemon."""


class Question(NamedTuple):
    """The text of a prompt. All of it must be printable and short: see `requester.plain`."""

    prompt: str  # one line: "PIN of the card"
    details: tuple[str, ...]  # lines: token or key, requester, earlier failures
    wanted: str = "PIN"  # what to type: "PIN" or "Passphrase"

    def text(self, between: str = "\n") -> str:
        return between.join((self.prompt, *self.details))


class Turn:
    """The time-out of one question. `withdraw` ends it early, from any thread."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._withdrawn = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._withdrawn, select.POLLIN)

    def left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def wait(self, fd: int) -> None:
        """Waits until `fd` is readable, or its peer has closed. Unanswered after the time-out; Withdrawn."""
        self._poll.register(fd, select.POLLIN)
        try:
            ready = {one for one, _ in self._poll.poll(self.left() * 1000)}
        finally:
            self._poll.unregister(fd)
        if self._withdrawn in ready:
            raise Withdrawn("withdrawn")
        if not ready:
            raise Unanswered("not answered in time")

    def withdraw(self) -> None:
        with self._lock:
            if self._withdrawn >= 0:
                os.eventfd_write(self._withdrawn, 1)

    def close(self) -> None:
        with self._lock:
            os.close(self._withdrawn)
            self._withdrawn = -1


class Way(Protocol):
    """A method of prompting. `available` and `notify` are thread-safe; `ask` is called by one thread at a time."""

    name: str

    def available(self) -> bool:
        """Returns whether this method may reach a person. Must not block."""

    def ask(self, question: Question, turn: Turn, /) -> bytearray:
        """Shows a question and returns the input, 1 to MAX_PIN bytes, which the caller wipes. Unavailable, Cancelled,
        Unanswered, Withdrawn."""

    def notify(self, question: Question, turn: Turn, /) -> bool:
        """Shows a notice that needs no answer, at most until the turn ends. False if it cannot be shown."""


def checked(pin: bytearray) -> bytearray:
    """Returns the input if its size is 1 to MAX_PIN bytes. Otherwise wipes it and raises Cancelled or Unavailable."""
    if not pin:
        raise Cancelled("nothing was typed")
    if len(pin) > MAX_PIN:
        pin[:] = bytes(len(pin))
        raise Unavailable(f"more than {MAX_PIN} bytes were typed")
    return pin
