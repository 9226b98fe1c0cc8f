"""Connects a person's terminal to the guest."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass

LEAVE = b"\x1d"  # Ctrl-], as in telnet: Ctrl-C belongs to the guest


@dataclass(frozen=True)
class PseudoTerminal:
    """A terminal, by an open descriptor for reading and writing."""

    descriptor: int = 0

    def size(self) -> tuple[int, int]:
        """Returns (rows, columns)."""
        size = os.get_terminal_size(self.descriptor)
        return size.lines, size.columns

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """A context in raw mode: all keys go to the guest unchanged. Restores the terminal at its end."""
        before = termios.tcgetattr(self.descriptor)
        tty.setraw(self.descriptor)
        try:
            yield
        finally:
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, before)

    def read(self) -> bytes:
        """Reads input. KeyboardInterrupt for the key LEAVE, and if the terminal was closed."""
        try:
            typed = os.read(self.descriptor, 1024)
        except OSError:
            typed = b""
        if not typed or LEAVE in typed:
            raise KeyboardInterrupt
        return typed
