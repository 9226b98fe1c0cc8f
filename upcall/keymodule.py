"""What a key module is: a name, and a way to open a key; the opened key has two verbs, wrap and unwrap.

A module is any object with these members; nothing is inherited. It is found by an entry point of the group
`upcall.key_modules`, whose name is the alias that stands in the auth token (at most 16 characters).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

API = 1  # the version of this page; a module states the one that it was written for
GROUP = "upcall.key_modules"

MAX_KEY = 67  # bytes that a caller may ask to have wrapped: cipher code, a key of 64, checksum
MAX_WRAPPED = 512  # bytes that eCryptfs has room for


class KeyHandle(Protocol):
    """A key that was opened once. Both verbs may be called from several threads at a time."""

    def wrap(self, key: bytes, /) -> bytes:
        """1 to 67 bytes of clear key to at most 512 wrapped ones. ModuleFailed if it cannot."""

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """The inverse. ModuleFailed if this key did not wrap it."""

    def stale(self) -> bool:
        """True once the key has to be opened anew, because its file changed or is gone. Cheap: one stat."""


# Asks the daemon for the key's passphrase: `source` is what the blob says about where it is kept. Gives a
# buffer that the module wipes after use; raises Refused("locked") when it cannot be had now.
AskPassphrase = Callable[[str], bytearray]


class KeyModule(Protocol):
    """A way of keeping keys."""

    name: str  # the alias in auth tokens
    api: int  # API of the page it was written for

    def open(self, signature: str, blob: bytes, ask: AskPassphrase, /) -> KeyHandle:
        """The key behind an auth token's blob, read and checked against the signature.

        ModuleFailed says why it cannot be opened; no secret may stand in the text.
        """


class Enrolled(NamedTuple):
    """A key that was made or checked, ready for the keyring. `blob` goes into the auth token."""

    signature: str
    blob: bytes
    description: str  # for people: "RSA-3072"


@runtime_checkable
class KeyMaker(Protocol):
    """The power to make and to enrol keys that live in files; a second, small protocol."""

    suffix: str  # of the files: ".pem"
    sizes: tuple[int, ...]  # bits, the first is the default; empty if there is no choice

    def generate(self, path: Path, passphrase: bytearray, bits: int, source: str, /) -> Enrolled:
        """A new key in `path` (0600, written atomically, never over another), protected by the passphrase.

        `source` goes into the blob: where the passphrase is kept, never the passphrase itself.
        """

    def enrol(self, path: Path, passphrase: bytearray, source: str | None, /) -> Enrolled:
        """An existing key, fully validated. `source` None puts the passphrase itself into the blob, as
        ecryptfs-utils' own modules do: readable by whoever can read the user's keyring."""
