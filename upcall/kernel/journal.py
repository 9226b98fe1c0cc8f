"""Writes entries to systemd's journal by its native protocol, without blocking.

One datagram of lines FIELD=value. For values with line feeds: FIELD, a line feed, the length as a little-endian u64,
the value, a line feed. https://systemd.io/JOURNAL_NATIVE_PROTOCOL
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

JOURNAL: Final = Path("/run/systemd/journal/socket")


def send(path: Path, fields: Iterable[tuple[str, object]]) -> None:
    """Writes one entry. OSError: FileNotFoundError and the like if there is no journal, EAGAIN or ENOBUFS if its
    buffer is full."""
    data = b"".join(pack_field(key, value) for key, value in fields)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(data, str(path))


def pack_field(key: str, value: object) -> bytes:
    """Returns the bytes of one field."""
    name, data = key.encode("ascii"), str(value).encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return b"%b\n%b%b\n" % (name, len(data).to_bytes(8, "little"), data)
    return b"%b=%b\n" % (name, data)
