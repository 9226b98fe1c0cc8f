"""What the daemon is told about keys at its start: when they lock, and what became of those to add at login. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class LockSettings(NamedTuple):
    """When keys lock automatically."""

    after: float = 0.0  # seconds without use; 0: never
    causes: tuple[str, ...] = ()  # of upcall.process.logind.CAUSES


class AddedKey(NamedTuple):
    """A key whose auth token was added to the user keyring."""

    name: str
    signature: str


class FailedKey(NamedTuple):
    """A key that could not be added. `file`: within the folder of keys; "": the folder itself."""

    file: str
    why: str


class LoginKeys(NamedTuple):
    """The results for all keys that are marked `auto`."""

    folder: Path = Path()  # of keys
    added: tuple[AddedKey, ...] = ()
    failed: tuple[FailedKey, ...] = ()
