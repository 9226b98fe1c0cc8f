"""Registers one daemon per uid and replaces it when another one registers (HELO, QUIT). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Link(Protocol):
    """The connection to one daemon."""

    def send(self, data: bytes, /) -> bool:
        """Sends one message without blocking. False if the socket buffer is full; ConnectionError if it is closed."""

    def close(self) -> None:
        """Closes the connection. May be called more than once."""


class Association:
    """A registered daemon: its credentials, its link, and its counters."""

    __slots__ = ("answered", "leaving", "link", "pid", "portid", "refused", "rejected", "since", "uid", "who")

    def __init__(self, uid: int, pid: int, portid: int, link: Link, since: float, began: int = 0) -> None:
        """`since`: when it registered, in seconds of CLOCK_MONOTONIC. `began`: the process's start time; with the
        pid it identifies the process even after the pid is reused."""
        self.uid, self.pid, self.portid = uid, pid, portid
        self.who = pid, began
        self.link = link
        self.since = since
        self.leaving = False  # it sent QUIT and has requests left to answer
        self.answered = self.refused = self.rejected = 0

    def __repr__(self) -> str:
        return f"<Association uid={self.uid} pid={self.pid} portid={self.portid}>"


class Registry:
    """Maps each uid to its registered daemon."""

    def __init__(self) -> None:
        self._by_uid: dict[int, Association] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def __iter__(self) -> Iterator[Association]:
        return iter(tuple(self._by_uid.values()))

    def get(self, uid: int) -> Association | None:
        """Returns the registered daemon of a uid; None if there is none."""
        return self._by_uid.get(uid)

    def helo(self, association: Association) -> Association | None:
        """Registers the daemon. Returns the one that it replaces, to which the caller must send QUIT, or None."""
        old = self._by_uid.get(association.uid)
        self._by_uid[association.uid] = association
        return old

    def remove(self, association: Association) -> bool:
        """Unregisters the daemon. False if it had been replaced already."""
        if self._by_uid.get(association.uid) is not association:
            return False
        del self._by_uid[association.uid]
        return True
