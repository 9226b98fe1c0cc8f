"""Fuzzes datagrams of systemd's password agents: any user may send to the socket.

The result is a PIN of 1 to 256 bytes, or one of the documented outcomes.
"""

from __future__ import annotations

import socket

from fuzz.target import holds
from upcall.daemon.prompting.question import MAX_PIN, Cancelled, Turn, Unanswered, Unavailable, Withdrawn, checked
from upcall.daemon.prompting.systemd import _answer

SEEDS = [b"+1234\0", b"-", b"+one\0two\0", b"+", b"+" + b"9" * 257, b"x"]
MOST = 2048


def run(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    turn = Turn(0.0)
    try:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        theirs.send(data)
        pin = checked(_answer(ours, turn))
        holds(1 <= len(pin) <= MAX_PIN and b"\0" not in pin, "a PIN out of bounds")
    except (Unavailable, Cancelled, Unanswered, Withdrawn):
        pass
    finally:
        turn.close()
        ours.close()
        theirs.close()
