"""One daemon per uid: HELO, QUIT, replacement. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Link(Protocol):
    """The way to one daemon."""

    def send(self, data: bytes, /) -> bool:
        """False if the daemon takes no more now; ConnectionError if it is gone."""

    def close(self) -> None: ...


class Association:
    """A daemon that said HELO: who it is, and the way to it."""

    __slots__ = ("answered", "leaving", "link", "pid", "portid", "refused", "rejected", "since", "uid", "who")

    def __init__(self, uid: int, pid: int, portid: int, link: Link, since: float, began: int = 0) -> None:
        """`began`: when the process did, which together with its pid is nobody else's."""
        self.uid, self.pid, self.portid = uid, pid, portid
        self.who = pid, began
        self.link = link
        self.since = since
        self.leaving = False  # it said QUIT, and still owes answers
        self.answered = self.refused = self.rejected = 0

    def __repr__(self) -> str:
        return f"<Association uid={self.uid} pid={self.pid} portid={self.portid}>"


class Registry:
    """Which daemon serves which uid."""

    def __init__(self) -> None:
        self._by_uid: dict[int, Association] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def __iter__(self) -> Iterator[Association]:
        return iter(tuple(self._by_uid.values()))

    def get(self, uid: int) -> Association | None:
        return self._by_uid.get(uid)

    def helo(self, association: Association) -> Association | None:
        """Registers it; gives the older daemon of that uid, which is to be sent QUIT."""
        old = self._by_uid.get(association.uid)
        self._by_uid[association.uid] = association
        return old

    def remove(self, association: Association) -> bool:
        """Forgets it; False if another one has taken its place already."""
        if self._by_uid.get(association.uid) is not association:
            return False
        del self._by_uid[association.uid]
        return True
