"""Implements a registered daemon that misuses its copies of a link's descriptors in every way its uid can.

A trick takes the link and returns what must stay referenced. Each must affect only the daemon itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks import raw
from tests.attacks.attacker import Told, become

_SO_PASSSEC, _SO_PASSPIDFD, _SO_LOCK_FILTER, _SO_ATTACH_FILTER = 34, 76, 44, 26
_SOL_NETLINK, _PKTINFO, _NO_ENOBUFS = 270, 3, 5
_TIMESTAMPS, _RXQ_OVFL = (29, 35, 37), 40
_F_SETSIG = 10
_WATCHES = 2_000  # for each end, and again at each registration


_did = 0  # steps that the kernel allowed


def _both(link: raw.Link, act: Callable[[socket.socket], object]) -> None:
    global _did
    for end in (link.far, link.mine):
        if end is not None:
            with contextlib.suppress(OSError):
                act(end)
                _did += 1


def _unconnect(end: socket.socket) -> None:
    address = struct.pack("=HHII", socket.AF_UNSPEC, 0, 0, 0)
    if ctypes.CDLL(None).connect(end.fileno(), address, len(address)) != 0:
        raise OSError("connect")


def disconnected(link: raw.Link, broker: int) -> None:
    _both(link, _unconnect)


def connected_elsewhere(link: raw.Link, broker: int) -> None:
    """Connects the ends to each existing socket, one after the other; last to a bystander's."""
    for portid in sorted(raw.portids()):
        _both(link, lambda end, portid=portid: end.connect((portid, 0)))  # type: ignore[misc]


def without_credentials(link: raw.Link, broker: int) -> None:
    _both(link, lambda end: end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0))


def more_ancillary_data(link: raw.Link, broker: int) -> None:
    for option in (_SO_PASSPIDFD, _SO_PASSSEC, *_TIMESTAMPS, _RXQ_OVFL):
        _both(link, lambda end, option=option: end.setsockopt(socket.SOL_SOCKET, option, 1))  # type: ignore[misc]
    for option in (_PKTINFO, _NO_ENOBUFS):
        _both(link, lambda end, option=option: end.setsockopt(_SOL_NETLINK, option, 1))  # type: ignore[misc]


def pidfds(link: raw.Link, broker: int) -> None:
    """Requests pidfds instead of credentials with each message."""
    without_credentials(link, broker)
    _both(link, lambda end: end.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1))


def signals(link: raw.Link, broker: int) -> None:
    """Requests a signal to the broker on each message."""

    def arm(end: socket.socket) -> None:
        fcntl.fcntl(end, fcntl.F_SETOWN, broker)
        fcntl.fcntl(end, _F_SETSIG, int(signal.SIGKILL))
        fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)

    _both(link, arm)


def blocking(link: raw.Link, broker: int) -> None:
    """Removes O_NONBLOCK, and sets time-outs of an hour."""

    def arm(end: socket.socket) -> None:
        end.setblocking(True)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", 3600, 0))

    _both(link, arm)


def filters(link: raw.Link, broker: int) -> None:
    """Attaches and locks a filter that drops all messages."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))

    def arm(end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))
        end.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)

    _both(link, arm)


def no_room(link: raw.Link, broker: int) -> None:
    def arm(end: socket.socket) -> None:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 0)

    _both(link, arm)


def full(link: raw.Link, broker: int) -> None:
    """Fills both queues, and keeps them full."""

    def fill(end: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                while True:
                    end.send(bytes(2000), raw.DONTWAIT)
            select.select([], [], [], 0.0005)

    _both(link, lambda end: threading.Thread(target=fill, args=(end,), daemon=True).start())


def stolen(link: raw.Link, broker: int) -> None:
    """Reads messages that are for the broker."""

    def take(end: socket.socket) -> None:
        while True:
            end.recv(raw.MOST)

    _both(link, lambda end: threading.Thread(target=take, args=(end,), daemon=True).start())


def as_the_broker(link: raw.Link, broker: int) -> None:
    """Sends all kinds of messages from the broker's end, and from the daemon's."""
    for message in raw.everything():
        _both(link, lambda end, message=message: end.send(message, raw.DONTWAIT))  # type: ignore[misc]


def watched(link: raw.Link, broker: int) -> list[Any]:
    """Adds thousands of watches, which each message wakes: the sender of a message spends that time."""
    held = []

    def watch(end: socket.socket) -> None:
        for _ in range(_WATCHES):
            held.append(select.epoll())
            held[-1].register(end, select.EPOLLIN)

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _both(link, watch)
    return held


def kept_when_replaced(link: raw.Link, broker: int) -> None:
    """Closes the connection, but keeps the sockets, and sends all kinds of messages on them."""
    if link.connection is not None:
        link.connection.close()
    as_the_broker(link, broker)


def nothing_read(link: raw.Link, broker: int) -> None:
    """Reads neither from the link nor from the connection."""


def flooded(link: raw.Link, broker: int) -> None:
    """Floods the link with messages that are expensive to handle."""

    def flood(end: socket.socket) -> None:
        messages = raw.everything()
        while True:
            for message in messages:
                with contextlib.suppress(OSError):
                    end.send(message, raw.DONTWAIT)

    _both(link, lambda end: threading.Thread(target=flood, args=(end,), daemon=True).start())


TRICKS: tuple[Callable[[raw.Link, int], list[Any] | None], ...] = (
    disconnected, connected_elsewhere, without_credentials, more_ancillary_data, pidfds, signals, blocking, filters,
    no_room, full, stolen, as_the_broker, watched, kept_when_replaced, nothing_read, flooded,
)  # fmt: skip


def hostile(told: Told, folder: Path, broker: int, trick: str) -> None:
    """Registers, performs a trick, and reports how many steps the kernel allowed. On the word "ask" makes requests to
    its own uid, so that the broker uses the link; on "again" registers again, and keeps the old link."""
    play = next(one for one in TRICKS if one.__name__ == trick)
    links = [raw.register(folder)]
    held = [play(links[0], broker)]
    told.say(_did)
    connection = raw.connect(folder / "broker.sock")
    while (word := told.word()) != "end":
        if word == "ask":
            for seq in range(40):
                with contextlib.suppress(OSError):
                    connection.send(raw.request(seq, seq, os.getuid(), raw.unwrap("0" * 16, b"x")), raw.DONTWAIT)
                with contextlib.suppress(OSError):
                    links[-1].mine.send(raw.response(seq, seq, b"x"), raw.DONTWAIT)
            told.say("asked")
        elif word == "again":
            with contextlib.suppress(OSError):
                links.append(raw.register(folder))
                held.append(play(links[-1], broker))
            told.say(len(links))


def pass_on(told: Told, folder: Path, uid: int, other: int) -> None:
    """Starts as root, becomes the daemon `uid` and registers. Passes both ends to a process of the uid `other`, which
    sends all kinds of messages on them. Reports how many steps the kernel allowed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            ours.close()
            become(other)
            _, fds, _, _ = socket.recv_fds(theirs, 1, 2)
            far, mine = (socket.socket(fileno=fd) for fd in fds)
            as_the_broker(raw.Link(mine, far, None), 0)
            theirs.send(str(_did).encode())
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    become(uid)
    link = raw.register(folder)
    assert link.far is not None
    socket.send_fds(ours, [b"x"], [link.far.fileno(), link.mine.fileno()])
    told.say(int(ours.recv(16)))
    told.word()
