"""Commands to a daemon without threads, what is left of a passphrase in messages, sockets of other daemons."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from upcall.core.messages import Refusal, Requester
from upcall.daemon import control as module
from upcall.daemon.control import RELOAD, UNLOCK, Control
from upcall.daemon.plugins import Plugins
from upcall.daemon.reload import Renewing
from upcall.kernel.local import connect, listen, listens
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


def test_a_hung_daemon_with_a_full_backlog_does_not_prevent_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with contextlib.ExitStack() as stack:
        hung = stack.enter_context(listen(path, 0o600))
        hung.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(9):
                stack.enter_context(connect(path, frozenset({os.geteuid()}), wait=False))
        assert listens(path)
        control = Control(path, cast(Any, Keys()), lambda _: None, lambda *_: None)
        control.close()
        assert path.is_socket()  # the hung one's, until the new one is registered


def test_sockets_of_daemons_that_are_gone_are_removed_at_start(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    gone = 1 << 22  # the kernel's limit of pids
    stale, ours, alive = (path.with_name(f"daemon.sock.{pid}") for pid in (gone, os.getppid(), gone + 1))
    for one in (stale, ours):
        listen(one, 0o600).close()
    (tmp_path / "daemon.sock.notes").touch()
    with listen(alive, 0o600):  # of another pid namespace
        Control(path, cast(Any, Keys()), lambda _: None, lambda *_: None).close()
    assert {one.name for one in tmp_path.iterdir()} >= {ours.name, alive.name, "daemon.sock.notes"}
    assert not stale.exists()


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
