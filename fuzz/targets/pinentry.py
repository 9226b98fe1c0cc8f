"""Fuzzes output of pinentry (Assuan), a program that the user chooses.

The result is a PIN of 1 to 256 bytes, or one of the documented outcomes. At most a hundred lines are read. Each
command is one line.
"""

from __future__ import annotations

import os
from typing import Any, cast

from fuzz.target import holds
from upcall.daemon.prompting.pinentry import _LINE, _Dialog, escaped
from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Turn, Unanswered, Unavailable, Withdrawn, checked

MOST = 8192
SEEDS = [
    b"OK Pleased to meet you\nD 12%2534\nOK\n",
    b"OK\n# comment\nS PASSWORD_FROM_CACHE\nERR 83886179 cancelled\n",
    b"OK\nERR 83886142 timeout\n",
    b"OK\nD %0\nOK\n",
    b"OK\nD " + b"9" * 300 + b"\nOK\n",
]


class _Process:
    def __init__(self, output: Any) -> None:
        self.stdout, self.stdin = output, None


def run(data: bytes) -> None:
    text = escaped(data.decode("utf-8", "surrogateescape"), 64)
    holds(len(text) <= 64 and b"\n" not in text and b"\r" not in text, "more than one line")
    read, write = os.pipe()
    turn = Turn(0.0)
    try:
        os.set_blocking(write, False)
        os.write(write, data[:MOST])
        os.close(write)
        dialog = object.__new__(_Dialog)
        dialog._turn, dialog._buffer, dialog._size, dialog._lines = turn, bytearray(_LINE), 0, 0
        with os.fdopen(read, "rb", 0) as output:
            dialog._process = cast(Any, _Process(output))
            dialog.reply()
            pin = checked(dialog.reply())
            holds(1 <= len(pin) <= MAX_PIN, "a PIN out of bounds")
    except (Unavailable, Cancelled, Unanswered, Withdrawn):
        pass
    finally:
        turn.close()
