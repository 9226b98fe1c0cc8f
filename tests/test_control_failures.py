"""Commands to a daemon that has no more threads, and what is left of a passphrase in messages."""

from __future__ import annotations

import socket
import threading
from typing import Any, cast

import pytest

from upcall.core.messages import Refusal, Requester
from upcall.daemon import control as module
from upcall.daemon.control import RELOAD, UNLOCK, Control
from upcall.daemon.plugins import Plugins
from upcall.daemon.reload import Renewing
from upcall.wire.envelope import Envelope, pack_request, take_response

SIGNATURE = b"80f0e50e8a936f95"
PASSPHRASE = b"open sesame"


class Keys:
    def unlock(self, signature: str, passphrase: bytearray) -> None:
        passphrase[:] = bytes(len(passphrase))


class Listener:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def accept(self) -> tuple[socket.socket, str]:
        return self._connection, ""


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def request(service: str, body: bytes = b"") -> bytes:
    return pack_request(Envelope(1, 2, service, Requester(1000, 1), 0, body))


def serve(message: bytes) -> bytes:
    """Serves a message; returns the answer."""
    control = object.__new__(Control)
    control._keys, control.on_reload, control.more = cast(Any, Keys()), no_thread, dict
    control._warm = lambda _: None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.listener = cast(Any, Listener(theirs))
    with ours:
        ours.send(message)
        control.serve_one()
        return ours.recv(1 << 17)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The messages that were received, themselves."""
    found: list[bytes] = []

    def receive(connection: socket.socket) -> bytes:
        found.append(connection.recv(1 << 17))
        return found[-1]

    monkeypatch.setattr(module, "receive", receive)
    return found


@pytest.mark.parametrize("message", [request(UNLOCK, SIGNATURE + PASSPHRASE), request(RELOAD)])
def test_a_command_is_refused_as_busy_without_threads(
    message: bytes, received: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    refused = take_response(serve(message)).outcome
    assert isinstance(refused, Refusal)
    assert refused.reason == "busy"
    assert received == [bytes(len(message))]


@pytest.mark.parametrize("damaged", [0, 4])
def test_a_malformed_message_is_wiped(damaged: int, received: list[bytes]) -> None:
    message = bytearray(request(UNLOCK, SIGNATURE + PASSPHRASE))
    message[damaged] ^= 0xFF
    assert serve(bytes(message)) == b""
    assert received == [bytes(len(message))]


def test_a_reload_without_threads_is_logged_and_a_hangup_does_not_end_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    log = cast(Any, lambda event, **_: events.append(event))
    renewing = Renewing(Plugins(), cast(Any, None), cast(Any, None), log)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    renewing.on_hangup()
    with pytest.raises(RuntimeError):
        renewing.ask()
    assert events == ["reload-failed"] * 2
