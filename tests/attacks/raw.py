"""Makes sockets and messages as any uid can, from bytes. Uses the standard library only."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

NETLINK_USERSOCK = 2
HELO, QUIT, REQUEST, RESPONSE = 100, 101, 102, 103
MOST = 70_000  # bytes of a message
DONTWAIT = int(socket.MSG_DONTWAIT)


def portids() -> set[int]:
    """Returns the portids of all NETLINK_USERSOCK sockets of this network namespace."""
    rows = Path("/proc/net/netlink").read_bytes().splitlines()[1:]
    return {int(fields[2]) for fields in map(bytes.split, rows) if fields[1] == b"2"}


def unbound() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_USERSOCK)


def bind(portid: int) -> socket.socket | None:
    """Returns a socket bound to this portid; None if another one is."""
    made = unbound()
    try:
        made.bind((portid, 0))
    except OSError:
        made.close()
        return None
    return made


def control(kind: int) -> bytes:
    return struct.pack("=IHHII", 16, kind, 0, 0, 0)


def request(seq: int, index: int, uid: int, body: bytes, service: bytes = b"key") -> bytes:
    size = 24 + 20 + len(service) + len(body)
    head = struct.pack("=IHHIIII", size, REQUEST, 0, seq, 0, index, size - 24)
    return head + struct.pack("=BBHIIQ", 1, len(service), 0, uid, 0, 0) + service + body


def response(seq: int, index: int, body: bytes) -> bytes:
    size = 24 + 4 + len(body)
    return struct.pack("=IHHIIIIBBH", size, RESPONSE, 0, seq, 0, index, size - 24, 1, 0, 0) + body


def kind(data: bytes) -> int:
    return int.from_bytes(data[4:6], sys.byteorder)


def position(data: bytes) -> tuple[int, int]:
    """Returns (sequence number, index) of a message."""
    seq, _, index = struct.unpack_from("=III", data, 8)
    return seq, index


def everything() -> list[bytes]:
    """Returns messages of each kind that a link carries, and malformed ones."""
    ask, body = b"\x40\x10" + b"0" * 16 + b"\x01x", unwrapped(bytes(16))
    return [
        control(HELO), control(QUIT), control(99), b"x", bytes(15), b"\xff" * 40,
        request(1, 0, os.getuid(), ask), request(1, 0, 0, ask),
        *(response(seq, index, body) for seq in (0, 1) for index in (0, 1, 31)),
    ]  # fmt: skip


def shout(portids: Iterable[int], messages: Iterable[bytes]) -> tuple[int, int]:
    """Sends each message to each portid. Returns how many were (accepted, refused)."""
    taken = refused = 0
    with unbound() as mouth:
        for portid in portids:
            for message in messages:
                try:
                    mouth.sendto(message, DONTWAIT, (portid, 0))
                    taken += 1
                except OSError:
                    refused += 1
    return taken, refused


def connect(path: Path, timeout: float = 5.0) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.connect(os.fspath(path))
    except OSError:
        connection.close()
        raise
    connection.settimeout(timeout)
    return connection


class Link:
    """A registered daemon's sockets. `far`: the broker's end; None if the broker does not send it."""

    def __init__(self, mine: socket.socket, far: socket.socket | None, connection: socket.socket | None) -> None:
        self.mine, self.far, self.connection = mine, far, connection

    def close(self) -> None:
        for end in (self.mine, self.far, self.connection):
            if end is not None:
                end.close()


def register(folder: Path) -> Link:
    """Registers as a daemon of this uid, by the way that this broker supports. OSError."""
    if (folder / "portid").exists():
        mine = unbound()
        mine.settimeout(5)
        mine.bind((0, 0))
        mine.sendto(control(HELO), (int((folder / "portid").read_text()), 0))
        data, sender = mine.recvfrom(MOST)
        if data != control(HELO):
            raise ConnectionError("the broker said something, but not HELO")
        mine.connect(sender)
        mine.settimeout(None)
        return Link(mine, None, None)
    link = asked_for(folder)
    link.mine.settimeout(5)
    link.mine.send(control(HELO))
    while link.mine.recv(MOST) != control(HELO):
        pass
    link.mine.settimeout(None)
    return link


def asked_for(folder: Path) -> Link:
    """Requests a link, and sends nothing on it. OSError."""
    connection = connect(folder / "registration.sock")
    connection.send(control(HELO))
    _, fds, _, _ = socket.recv_fds(connection, MOST, 2)
    if len(fds) != 2:
        connection.close()
        raise ConnectionError("no link")
    far, mine = (socket.socket(fileno=fd) for fd in fds)
    return Link(mine, far, connection)


def ask(connection: socket.socket, body: bytes, seq: int = 1, service: bytes = b"key") -> bytes:
    """Makes a request. Returns the answer's body; b"" for a refusal or a time-out."""
    with contextlib.suppress(OSError):
        connection.send(request(seq, seq, os.getuid(), body, service))
        data = connection.recv(MOST)
        if len(data) > 28 and data[25] == 0:
            return data[28:]
    return b""


def unwrap(signature: str, wrapped: bytes) -> bytes:
    """Returns a tag 64 packet."""
    size = len(wrapped)
    length = bytes((size,)) if size < 192 else bytes((((size - 192) >> 8) + 192, (size - 192) & 0xFF))
    return b"\x40\x10" + signature.encode("ascii") + length + wrapped


def unwrapped(key: bytes) -> bytes:
    """Returns a tag 65 packet: the answer with a clear AES-128 key."""
    return b"\x41\x00" + bytes((len(key) + 3,)) + b"\x07" + key + struct.pack(">H", sum(key) & 0xFFFF)
