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
    """The terminal behind an open descriptor, both ways."""

    descriptor: int = 0

    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        size = os.get_terminal_size(self.descriptor)
        return size.lines, size.columns

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """Every key goes to the guest as it is; afterwards the terminal is as it was."""
        before = termios.tcgetattr(self.descriptor)
        tty.setraw(self.descriptor)
        try:
            yield
        finally:
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, before)

    def read(self) -> bytes:
        """What was typed. Raises KeyboardInterrupt for the key that leaves, and when the terminal is gone."""
        try:
            typed = os.read(self.descriptor, 1024)
        except OSError:
            typed = b""
        if not typed or LEAVE in typed:
            raise KeyboardInterrupt
        return typed
