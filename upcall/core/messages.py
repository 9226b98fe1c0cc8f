"""Defines the values that travel between requester, broker and daemon. Immutable, without behaviour."""

from __future__ import annotations

from typing import NamedTuple


class Requester(NamedTuple):
    """The requesting process. `pid` is 0 where the kernel does not report it (eCryptfs does not)."""

    uid: int
    pid: int


class Answer(NamedTuple):
    """A granted request. `body`: the result, in the format of the service (docs/protocol.md)."""

    body: bytes


class Refusal(NamedTuple):
    """A request that is not granted: `reason` for people and counters, `errno` for kernel interfaces, `why`: the
    daemon's own words for its own user, otherwise empty (docs/protocol.md)."""

    reason: str
    errno: int
    why: str = ""
