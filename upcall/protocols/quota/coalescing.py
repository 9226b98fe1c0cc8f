"""Coalesces equal quota warnings: each repetition increments a counter, so a flood takes no memory. Pure.

Two warnings are equal if their bytes after the headers are. One user can cause different warnings through projects and
groups, so each causing uid has a share of the table.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Final

from upcall.core.errors import PeerError
from upcall.protocols.quota.warning import Sequence, messages

PER_CAUSE: Final = 64  # different warnings that wait for the worker
IN_ALL: Final = 8192  # different warnings of all uids

_BEFORE = 20  # nlmsghdr, genlmsghdr
_SIZE = 76  # bytes; of every message, in all kernels so far
_HEAD = struct.Struct("=IHHI")


class Folding:
    """The warnings received since the last `take`, with their counts. `family`: the netlink message type of
    VFS_DQUOT."""

    def __init__(self, family: int) -> None:
        self.family = family
        self.sequence = Sequence()
        self.received = 0
        self.folded = 0  # equal to one that was waiting
        self.dropped = 0  # the table, or the uid's share of it, was full
        self.nonsense = 0
        self._table: dict[bytes, int] = {}
        self._causes: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._table)

    def add(self, datagrams: list[bytes]) -> None:
        """Counts the warnings in these datagrams. Runs for every message: it must stay fast."""
        sequence, table, head, family = self.sequence, self._table, _HEAD.unpack_from, self.family
        for data in datagrams:
            if len(data) != _SIZE:
                self._add_slowly(data)
                continue
            length, kind, _, seq = head(data)
            if length != _SIZE or kind != family:
                self._add_slowly(data)
                continue
            if seq == sequence.next:
                sequence.next = (seq + 1) & 0xFFFFFFFF
            else:
                sequence(seq)
            key = data[_BEFORE:]
            if key in table:
                table[key] += 1
                self.folded += 1
            else:
                self._new(key)
            self.received += 1

    def _add_slowly(self, data: bytes) -> None:
        """Handles a datagram of another size: several messages, one of a newer kernel, or malformed bytes."""
        try:
            for message in messages(data):
                if message.type != self.family:
                    self.nonsense += 1
                    continue
                self.sequence(message.seq)
                self.received += 1
                key = message.data[_BEFORE:]
                if key in self._table:
                    self._table[key] += 1
                    self.folded += 1
                else:
                    self._new(key)
        except PeerError:
            self.nonsense += 1

    def _new(self, key: bytes) -> None:
        cause = key[-8:]  # CAUSED_ID is the last attribute
        if self._causes[cause] >= PER_CAUSE or len(self._table) >= IN_ALL:
            self.dropped += 1
            return
        self._causes[cause] += 1
        self._table[key] = 1

    def take(self) -> dict[bytes, int]:
        """Returns the table, attributes -> count, and starts an empty one."""
        table, self._table = self._table, {}
        self._causes.clear()
        return table
