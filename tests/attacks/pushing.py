"""Floods the broker's sockets with HELO, descriptors, and connections that are never read."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

from tests.attacks import raw
from tests.attacks.attacker import Told

_DESCRIPTORS, _MESSAGES = 253, 40  # SCM_MAX_FD; messages
_BLOCKED = 64  # threads that block until the queue has room


def hellos(told: Told, folder: Path) -> None:
    """Sends HELO as fast as possible, from many blocked threads, so that the next one that is received is its own."""
    public = folder / "portid"

    def push() -> None:
        while True:
            with contextlib.suppress(OSError):
                if public.exists():
                    with raw.unbound() as mouth:
                        while True:
                            mouth.sendto(raw.control(raw.HELO), (int(public.read_text()), 0))
                else:
                    with raw.connect(folder / "registration.sock") as connection:
                        connection.send(raw.control(raw.HELO))
                        connection.recv(raw.MOST)  # drops the descriptors

    for _ in range(_BLOCKED):
        threading.Thread(target=push, daemon=True).start()
    told.say("pushing")
    told.word()


def unread(told: Told, folder: Path, count: int) -> None:
    """Requests `count` links and receives none, so that their descriptors stay in flight. Reports how many it could
    request."""
    held = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            held.append(raw.connect(folder / "registration.sock"))
            held[-1].send(raw.control(raw.HELO))
    told.say(len(held))
    told.word()


def many_descriptors(told: Told, folder: Path, path: Path) -> None:
    """Sends messages with the maximum number of descriptors: of a FIFO, of sockets, of the connection itself. Reports
    how many it has sent, and how many the kernel has refused."""
    fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    sent = refused = 0
    held = []
    for name in ("broker.sock", "registration.sock"):
        for message in (b"x", raw.control(raw.HELO), raw.request(1, 1, os.getuid(), b"x"), raw.request(2, 2, 0, b"")):
            for _ in range(_MESSAGES):
                with contextlib.suppress(OSError):
                    connection = raw.connect(folder / name)
                    held.append(connection)
                    for fd in (fifo, connection.fileno(), held[0].fileno()):
                        try:
                            socket.send_fds(connection, [message], [fd] * _DESCRIPTORS, raw.DONTWAIT)
                        except PermissionError:  # Linux 6.16: the broker accepts none
                            refused += _DESCRIPTORS
                        else:
                            sent += _DESCRIPTORS
            while len(held) > 1:
                held.pop().close()
    told.say([sent, refused])
    told.word()
