"""Provides checks and a file handle for key modules. Plugins may use them.

- `FileHandle`: a handle that is stale once its file has changed;
- `check_source`, `check_new`, `check_changed`: validate the source of a passphrase, as a blob records it;
- `check_clear`, `check_room`, `self_test`: detect faults before the first file is encrypted;
- `wipe`: overwrites a buffer.

Private keys in PEM: `upcall.keys.pem`. Reading and writing other files: `upcall.keys.private_file`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import MAX_KEY, Changing, Limits, Making
from upcall.keys.private_file import Fingerprint, fingerprint
from upcall.keys.private_file import wipe as wipe

# Sources of a passphrase: a prompt, the `keyring` library, none needed, a file ("file:/absolute/path").
ASK: Final = "ask"
KEYRING: Final = "keyring"
NONE: Final = "none"
FILE: Final = "file:"
COMPAT: Final = "compat"  # the blob itself, for key modules that ecryptfs-utils has, too


def check_source(source: str, none: bool = True) -> None:
    """UsageError unless `source` is "ask", "keyring" or "file:/absolute/path", or "none" if `none` allows it."""
    known = (ASK, KEYRING, NONE) if none else (ASK, KEYRING)
    if "\0" in source or (source not in known and not source.startswith(FILE + "/")):
        raise UsageError(f"{source!r} says nothing about where a passphrase is kept")


def check_new(making: Making) -> None:
    """UsageError unless a new key file has a passphrase and a source for it, or no passphrase and the source
    "none"."""
    check_source(making.source)
    if bool(making.passphrase) is (making.source == NONE):
        raise UsageError("a key file has a passphrase, or the source `none`")


def check_changed(changing: Changing, compat: bool = False) -> None:
    """The same for the new passphrase of a key file. `compat`: the passphrase may be in the blob itself."""
    if not (compat and changing.source == COMPAT):
        check_source(changing.source)
    if bool(changing.passphrase) is (changing.source == NONE):
        raise UsageError("a key file has a passphrase, or the source `none`")


def check_clear(key: bytes) -> None:
    """ModuleFailed unless `key` has the size of a key to wrap: 1 to MAX_KEY bytes."""
    if not 1 <= len(key) <= MAX_KEY:
        raise ModuleFailed(f"{len(key)} bytes to wrap, 1 to {MAX_KEY} are possible")


def check_room(needed: int, limits: Limits) -> None:
    """ModuleFailed unless a wrapped key of `needed` bytes fits. `needed`: the size of the longest key, wrapped."""
    if needed > limits.wrapped:
        raise ModuleFailed(f"a wrapped key has up to {needed} bytes, there is room for {limits.wrapped}")


def self_test(wrap: Callable[[bytes], bytes], unwrap: Callable[[bytes], bytes], path: str = "") -> None:
    """Wraps and unwraps a random key of MAX_KEY bytes, the longest of eCryptfs. ModuleFailed if it does not come back.
    `path`: of the key's file, for the error."""
    clear = os.urandom(MAX_KEY)
    if unwrap(wrap(clear)) != clear:
        raise ModuleFailed(f"{path}{': ' if path else ''}the key does not unwrap what it wrapped")


class FileHandle:
    """A base class for handles of keys in files: implements `Watched`."""

    def __init__(self, path: str, found: Fingerprint) -> None:
        """`path`: of the key's file. `found`: its fingerprint from before it was read."""
        self._path, self._found = path, found

    def stale(self) -> bool:
        """Returns whether the file was changed, replaced or removed. Costs one stat(2)."""
        try:
            return fingerprint(os.stat(self._path)) != self._found  # noqa: PTH116  a third of Path's cost
        except OSError:
            return True
