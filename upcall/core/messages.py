"""The words: what travels between requester, broker and daemon. Frozen, without behaviour."""

from __future__ import annotations

from typing import NamedTuple


class Requester(NamedTuple):
    """Who asks. `pid` is 0 where the kernel does not say (eCryptfs does not)."""

    uid: int
    pid: int


class Answer(NamedTuple):
    """What the service's requester wanted to have."""

    body: bytes


class Refusal(NamedTuple):
    """A request not granted: the errno for whoever speaks in errnos, the reason for people and counters."""

    reason: str
    errno: int
