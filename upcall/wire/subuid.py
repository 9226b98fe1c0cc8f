"""Parses /etc/subuid, which assigns ranges of subordinate uids to users. Pure.

Source: subuid(5): `name-or-uid:first:count`, one range per line.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

_LINE = re.compile(r"([^:\s]+):([0-9]{1,10}):([0-9]{1,10})", re.ASCII)
_NO_UID = 0xFFFFFFFF  # (uid_t) -1
_MOST = 65536  # ranges


class Ranges:
    """Maps a uid to a person: the owner of its range, or the uid itself."""

    def __init__(self, ranges: Iterable[tuple[int, int, int]] = ()) -> None:
        """`ranges`: (first, last + 1, owner). Where they overlap, the one that begins first applies. The uid of an
        owner, and 0, always map to themselves."""
        self._firsts: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._owners = {0}
        past = 0
        for first, end, owner in sorted(ranges):
            first = max(first, past)
            if first < end:
                self._firsts.append(first)
                self._ranges.append((end, owner))
                self._owners.add(owner)
                past = end

    def __len__(self) -> int:
        return len(self._ranges)

    def of(self, uid: int) -> int:
        """Returns the person that a uid belongs to. O(log n)."""
        at = bisect_right(self._firsts, uid) - 1
        if at < 0 or uid in self._owners:
            return uid
        end, owner = self._ranges[at]
        return owner if uid < end else uid


class Taken(NamedTuple):
    """The parsed file."""

    people: Ranges
    skipped: int  # lines that are broken, name no user, or claim root's uid


def take_subuid(text: str, uid_of: Callable[[str], int | None]) -> Taken:
    """Parses the text of /etc/subuid. Malformed lines are counted and skipped. `uid_of`: returns the uid of a user
    name, None if there is none; called once per name."""
    uids: dict[str, int | None] = {}
    ranges: list[tuple[int, int, int]] = []
    skipped = 0
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or len(ranges) >= _MOST:
            skipped += 1
            continue
        name, first, count = found[1], int(found[2]), int(found[3])
        if name not in uids:
            uids[name] = int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else uid_of(name)
        owner = uids[name]
        if owner is None or owner >= _NO_UID or first == 0 or count == 0 or first + count > _NO_UID:
            skipped += 1
            continue
        ranges.append((first, first + count, owner))
    return Taken(Ranges(ranges), skipped)
