"""Keeps passphrases in locked memory, by the signature of their key."""

from __future__ import annotations

from collections.abc import Iterator

from upcall.kernel.process import LockedMemory


class Passphrases:
    """Not thread-safe: the owner must hold a lock. Iterates over the signatures."""

    def __init__(self) -> None:
        self._kept: dict[str, LockedMemory] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def get(self, signature: str) -> bytearray | None:
        """Returns a copy, which the caller wipes; None if there is none."""
        kept = self._kept.get(signature)
        return None if kept is None else kept.copy()

    def keep(self, signature: str, passphrase: bytearray) -> None:
        """Moves a passphrase to locked memory, in place of an earlier one: the caller's buffer is wiped."""
        self.wipe(signature)
        self._kept[signature] = LockedMemory(passphrase)

    def wipe(self, signature: str) -> None:
        """Wipes a passphrase, if there is one."""
        kept = self._kept.pop(signature, None)
        if kept is not None:
            kept.wipe()
