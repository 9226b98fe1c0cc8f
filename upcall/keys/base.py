"""What key modules share: checks, sources of passphrases, handles of keys in files. Plugins may use it, or not.

- `FileHandle`: a handle that is stale once its file has changed;
- `check_source`, `check_new`: where a passphrase may be kept, as a blob says it;
- `check_clear`, `check_room`, `self_test`: what no module should leave to the first file;
- `wipe`.

Private keys in PEM: `upcall.keys.pem`. Reading and writing other files: `upcall.keys.private_file`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import MAX_KEY, Limits, Making
from upcall.keys.private_file import Fingerprint, fingerprint
from upcall.keys.private_file import wipe as wipe

# Sources of a passphrase: a person, the `keyring` library, none is needed, a file ("file:/absolute/path").
ASK: Final = "ask"
KEYRING: Final = "keyring"
NONE: Final = "none"
FILE: Final = "file:"


def check_source(source: str, none: bool = True) -> None:
    """UsageError unless `source` is `ask`, `keyring` or `file:/absolute/path`, or `none` where that is possible."""
    known = (ASK, KEYRING, NONE) if none else (ASK, KEYRING)
    if "\0" in source or (source not in known and not source.startswith(FILE + "/")):
        raise UsageError(f"{source!r} says nothing about where a passphrase is kept")


def check_new(making: Making) -> None:
    """UsageError unless a new key file gets a passphrase that is kept somewhere, or none and the source `none`."""
    check_source(making.source)
    if bool(making.passphrase) is (making.source == NONE):
        raise UsageError("a key file has a passphrase, or the source `none`")


def check_clear(key: bytes) -> None:
    """ModuleFailed unless `key` has the length of one that may be wrapped."""
    if not 1 <= len(key) <= MAX_KEY:
        raise ModuleFailed(f"{len(key)} bytes to wrap, 1 to {MAX_KEY} are possible")


def check_room(needed: int, limits: Limits) -> None:
    """ModuleFailed unless the caller has room for `needed` bytes: the longest key that it hands over, wrapped."""
    if needed > limits.wrapped:
        raise ModuleFailed(f"a wrapped key has up to {needed} bytes, there is room for {limits.wrapped}")


def self_test(wrap: Callable[[bytes], bytes], unwrap: Callable[[bytes], bytes], path: str = "") -> None:
    """The longest key that eCryptfs could send, there and back. ModuleFailed, which names the `path` of a file."""
    clear = os.urandom(MAX_KEY)
    if unwrap(wrap(clear)) != clear:
        raise ModuleFailed(f"{path}{': ' if path else ''}the key does not unwrap what it wrapped")


class FileHandle:
    """For handles to inherit: `Watched`, by the file that the key was read from."""

    def __init__(self, path: str, found: Fingerprint) -> None:
        """`found`: from before the reading."""
        self._path, self._found = path, found

    def stale(self) -> bool:
        """Whether the file is another one now, or gone. One stat(2)."""
        try:
            return fingerprint(os.stat(self._path)) != self._found  # noqa: PTH116  a third of Path's cost
        except OSError:
            return True
