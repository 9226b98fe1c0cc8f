"""Fuzzes answers of a terminal to a prompt, from any process of the user.

The result is a PIN of 1 to 256 bytes, one of the four documented outcomes, or a closed connection. At most sixteen
messages are read for one question. An answer to another question is never accepted.
"""

from __future__ import annotations

import socket

from fuzz.target import holds
from upcall.daemon.prompting.agent import _LATE, _ask, _Gone
from upcall.daemon.prompting.question import (
    MAX_PIN,
    Cancelled,
    Question,
    Turn,
    Unanswered,
    Unavailable,
    Withdrawn,
    checked,
)
from upcall.wire.isolation import ANSWER, FAILED, REFUSED, ChildMessage, pack, take

_NUMBER = 7
MOST = 8192


def _framed(*messages: bytes | bytearray) -> bytes:
    return b"".join(len(one).to_bytes(2, "big") + one for one in messages)


SEEDS = [
    _framed(pack(ChildMessage(ANSWER, 3, data=b"0000")), pack(ChildMessage(ANSWER, _NUMBER, data=b"1234"))),
    _framed(pack(ChildMessage(REFUSED, _NUMBER, text="no"))),
    _framed(pack(ChildMessage(FAILED, _NUMBER, text="\x1b[2J"))),
    _framed(pack(ChildMessage(ANSWER, _NUMBER, data=b"9" * 300))),
]


def run(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    turn = Turn(0.0)  # reads available data only; does not block
    sent: list[bytes] = []
    try:
        theirs.setblocking(False)
        at = 0
        while at + 2 < len(data) and len(sent) < 2 * _LATE:
            size = int.from_bytes(data[at : at + 2], "big")
            sent.append(data[at + 2 : at + 2 + size])
            if sent[-1]:
                theirs.send(sent[-1])
            at += 2 + size
        pin = checked(_ask(ours, _NUMBER, Question("PIN", ()), turn))
    except (Unavailable, Cancelled, Unanswered, Withdrawn, _Gone, OSError):
        return
    finally:
        turn.close()
        ours.close()
        theirs.close()
    holds(1 <= len(pin) <= MAX_PIN, "a PIN out of bounds")
    answers = [take(one) for one in sent if one and _is_answer(one)]
    holds(any(one.data == pin for one in answers), "a PIN that nobody gave")


def _is_answer(data: bytes) -> bool:
    try:
        message = take(data)
    except Exception:  # noqa: BLE001 - anything that cannot be parsed is not an answer
        return False
    return message.kind == ANSWER and message.id == _NUMBER
