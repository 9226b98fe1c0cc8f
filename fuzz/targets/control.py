"""Fuzzes daemon.sock: messages of the user's processes to the user's daemon.

Never raises. Messages that are not valid requests of a known service change nothing. A signature is checked before
use.
"""

from __future__ import annotations

import socket
from typing import Any, cast

from fuzz.target import holds, same
from upcall.core.messages import Requester
from upcall.daemon.control import LOCK, RELOAD, STATUS, UNLOCK, Control
from upcall.protocols.ecryptfs.packets import is_signature
from upcall.wire.envelope import Envelope, pack_request, take_request, take_response

_SIGNATURE = b"80f0e50e8a936f95"
SEEDS = [
    pack_request(Envelope(1, 2, service, Requester(1000, 1), 0, body))
    for service in (UNLOCK, LOCK, STATUS, RELOAD, "daemon.prompt", "other")
    for body in (b"", _SIGNATURE, b"x" * 16)
]


def _attach(connection: socket.socket, welcome: bytes) -> None:
    connection.send(welcome)
    connection.close()


class _Keys:
    def status(self) -> list[object]:
        return []

    held = locks = remembered = status

    def lock(self, signature: str | None) -> int:
        holds(signature is None or is_signature(signature), "no signature")
        return 1

    def unlock(self, signature: str, passphrase: bytearray) -> bool:
        holds(is_signature(signature), "no signature")
        passphrase[:] = bytes(len(passphrase))
        return True

    def unlock_all(self) -> bool:
        return True


class _Played:
    """A simulated listener with one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def accept(self) -> tuple[socket.socket, str]:
        return self._connection, ""


def run(data: bytes) -> None:
    if not data:
        return
    control = object.__new__(Control)
    control._keys, control.on_reload, control.more = cast(Any, _Keys()), lambda: None, dict
    control._since, control.last_refusal = 0.0, dict
    control._warm, control._attach = lambda _: None, _attach
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.listener = cast(Any, _Played(theirs))
    with ours:
        ours.setblocking(False)
        ours.send(data)
        control.serve_one()
        answer = ours.recv(1 << 17)
    if answer:
        asked = take_request(data)
        found = take_response(answer)
        same((found.seq, found.index), (asked.seq, asked.index))
