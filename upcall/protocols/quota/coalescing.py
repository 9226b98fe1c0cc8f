"""Equal warnings are counted, not kept: whoever floods costs a counter. Pure.

A warning is known by its bytes behind the headers, which are the same whenever the same thing happens. One user can
make different ones, by projects and groups; so the table has a share for each uid that causes them.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Final

from upcall.core.errors import PeerError
from upcall.protocols.quota.warning import Sequence, messages

PER_CAUSE: Final = 64  # different warnings that wait for the clerk
IN_ALL: Final = 8192

_BEFORE = 20  # nlmsghdr, genlmsghdr
_SIZE = 76  # of every message of a kernel up to today
_HEAD = struct.Struct("=IHHI")


class Folding:
    """What came in since the clerk was last given something."""

    def __init__(self, family: int) -> None:
        self.family = family
        self.sequence = Sequence()
        self.received = 0
        self.folded = 0  # equal to one that was waiting
        self.dropped = 0  # found no room in the table
        self.nonsense = 0
        self._table: dict[bytes, int] = {}
        self._causes: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._table)

    def add(self, datagrams: list[bytes]) -> None:
        """Counts what the kernel sent. Runs for every message: nothing here may be slow."""
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
        """A datagram of another size: several messages, or one of a newer kernel, or nonsense."""
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
        cause = key[-8:]  # CAUSED_ID comes last
        if self._causes[cause] >= PER_CAUSE or len(self._table) >= IN_ALL:
            self.dropped += 1
            return
        self._causes[cause] += 1
        self._table[key] = 1

    def take(self) -> dict[bytes, int]:
        """The table, how often each warning came; an empty one takes its place."""
        table, self._table = self._table, {}
        self._causes.clear()
        return table
