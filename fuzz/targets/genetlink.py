"""Fuzzes the kernel's list of a socket's multicast groups, and the ids that the child process prints.

Never raises. Each set bit is one group.
"""

from __future__ import annotations

import socket
from typing import cast

from fuzz.target import same
from upcall.kernel.genetlink import memberships

SEEDS = [b"\1\0\0\0", bytes(8) + b"\x80\0\0\0", b"", b"\1"]
MOST = 512  # bytes of the getsockopt buffer


class _Played:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        return self._data[:size]


def run(data: bytes) -> None:
    whole = data[: len(data) & ~3]
    found = memberships(cast(socket.socket, _Played(data)))
    same(len(found), int.from_bytes(whole, "little").bit_count())
