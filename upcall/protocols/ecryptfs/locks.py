"""Which keys are refused because somebody locked them, or something did. Pure."""

from __future__ import annotations

from typing import Final

COMMAND: Final = "command"  # the cause of what a person has locked; nothing but a person ends it


class Locks:
    """Not for several threads: its owner holds a lock.

    A lock is on one key, or on all for some cause (a command, suspend, ...). A person who unlocks a key takes it out
    of every lock that there is; a later one has it again.
    """

    def __init__(self) -> None:
        self._single: set[str] = set()
        self._all: dict[str, set[str]] = {}  # cause -> the keys that were unlocked since
        self.times = 0  # how often all keys were locked: what was begun before is not to be kept

    def refuses(self, signature: str) -> bool:
        """Of this alone no lock is needed: it is asked on every request."""
        return signature in self._single or any(signature not in but for but in [*self._all.values()])

    def lock(self, signature: str) -> None:
        self._single.add(signature)

    def lock_all(self, cause: str) -> None:
        self._all[cause] = set()
        self.times += 1

    def unlock(self, signature: str) -> None:
        self._single.discard(signature)
        for but in self._all.values():
            but.add(signature)

    def unlock_all(self, cause: str | None = None) -> None:
        """What was locked for this cause; None: whatever was locked."""
        if cause is None:
            self._single.clear()
            self._all.clear()
        else:
            self._all.pop(cause, None)

    @property
    def single(self) -> list[str]:
        """The keys that are locked by themselves, sorted."""
        return sorted(self._single)

    @property
    def causes(self) -> list[str]:
        """For which all keys are locked, sorted."""
        return sorted(self._all)
