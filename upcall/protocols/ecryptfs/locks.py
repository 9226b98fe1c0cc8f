"""Keeps which keys are locked, by a command or an event such as suspend. Pure."""

from __future__ import annotations

from typing import Final

COMMAND: Final = "command"  # the cause of a person's lock; only a person's unlock ends it


class Locks:
    """Not thread-safe: the owner must hold a lock, except for `refuses`, `times` and `lock_of`.

    A lock is on one key, or on all keys for a cause (a command, suspend, ...). Unlocking a key exempts it from all
    present locks, not from later ones. `at`: when it was locked, in seconds since the epoch, for people.
    """

    def __init__(self) -> None:
        self._single: dict[str, float] = {}  # signature -> when
        self._all: dict[str, set[str]] = {}  # cause -> the keys that were unlocked since
        self._since: dict[str, float] = {}  # cause -> when
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

    def lock_of(self, signature: str) -> tuple[str, float] | None:
        """Returns the cause of a key's lock, and since when; None if it is not locked. Needs no lock."""
        found = [(self._since.get(cause, 0.0), cause) for cause, but in [*self._all.items()] if signature not in but]
        if (single := self._single.get(signature)) is not None:
            found.append((single, COMMAND))
        at, cause = min(found, default=(0.0, ""))
        return (cause, at) if cause else None

    def lock(self, signature: str, at: float = 0.0) -> None:
        self._single[signature] = at
        self._single_times[signature] = self._single_times.get(signature, 0) + 1

    def lock_all(self, cause: str, at: float = 0.0) -> None:
        self._since[cause] = at
        self._all[cause] = set()
        self._times += 1

    def unlock(self, signature: str) -> None:
        self._single.pop(signature, None)
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

    def report(self) -> list[dict[str, object]]:
        """Returns all locks, as plain data: `signature` of one key, or all keys but those in `unlocked`."""
        found: list[dict[str, object]] = [
            {"cause": COMMAND, "since": at, "signature": signature} for signature, at in sorted(self._single.items())
        ]
        for cause, but in sorted(self._all.items()):
            found.append({"cause": cause, "since": self._since[cause], "signature": None, "unlocked": sorted(but)})
        return found

    @property
    def causes(self) -> list[str]:
        """The causes for which all keys are locked, sorted."""
        return sorted(self._all)
