"""Keeps which keys are locked, by a command or an event such as suspend. Pure."""

from __future__ import annotations

from typing import Final

COMMAND: Final = "command"  # the cause of a person's lock; only a person's unlock ends it


class Locks:
    """Not thread-safe: the owner must hold a lock, except for `refuses` and `times`.

    A lock is on one key, or on all keys for a cause (a command, suspend, ...). Unlocking a key exempts it from all
    present locks, not from later ones.
    """

    def __init__(self) -> None:
        self._single: set[str] = set()
        self._all: dict[str, set[str]] = {}  # cause -> the keys that were unlocked since
        self._times = 0  # how often all keys were locked
        self._single_times: dict[str, int] = {}  # how often each key was locked individually

    def refuses(self, signature: str) -> bool:
        """Returns whether the key is locked. Needs no lock: it is called on every request."""
        if signature in self._single:
            return True
        return bool(self._all) and any(signature not in but for but in [*self._all.values()])

    def times(self, signature: str) -> int:
        """Returns how often the key was locked; a key whose opening began before must not be kept. Needs no lock."""
        return self._times + self._single_times.get(signature, 0)

    def lock(self, signature: str) -> None:
        self._single.add(signature)
        self._single_times[signature] = self._single_times.get(signature, 0) + 1

    def lock_all(self, cause: str) -> None:
        self._all[cause] = set()
        self._times += 1

    def unlock(self, signature: str) -> None:
        self._single.discard(signature)
        for but in self._all.values():
            but.add(signature)

    def unlock_all(self, cause: str | None = None) -> None:
        """Ends the lock for a cause; None: all locks."""
        if cause is None:
            self._single.clear()
            self._all.clear()
        else:
            self._all.pop(cause, None)

    @property
    def single(self) -> list[str]:
        """The signatures of keys that are locked individually, sorted."""
        return sorted(self._single)

    @property
    def causes(self) -> list[str]:
        """The causes for which all keys are locked, sorted."""
        return sorted(self._all)
