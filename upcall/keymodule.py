"""Defines the interface of key modules, which open keys; an opened key wraps and unwraps.

A module is any object with the members of `KeyModule`; nothing is inherited. It is found by an entry point of the
group `upcall.key_modules`, named for the alias in the auth token (at most 16 characters). A module that loads foreign
libraries has an entry point of the same name in the group `upcall.isolated`, and runs in a process of its own. The
other protocols here are optional: upcall uses each one that a module or handle implements.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

API = 1  # the version of this interface; a module states the one that it was written for
GROUP = "upcall.key_modules"
ISOLATED_GROUP = "upcall.isolated"

MAX_KEY = 67  # bytes that a caller may ask to have wrapped: cipher code, a key of 64, checksum
MAX_WRAPPED = 512  # bytes, the limit of eCryptfs
MAX_BLOB = 4096  # bytes of an auth token's data for a module, which is untrusted


class Limits(NamedTuple):
    """The caller's limits in bytes: the longest key to wrap, and the longest wrapped key that it can store. A key
    that cannot comply is refused when it is enrolled, not when the first file is written."""

    key: int = MAX_KEY
    wrapped: int = MAX_WRAPPED


class Secrets(Protocol):
    """Supplies secrets to a module, from the daemon or the command line. The module must wipe them after use.

    Call it in the thread in which the module was called: the request is looked up by thread. Each method may raise
    Refused, which the module must not catch: "locked" if the secret is not available; "prompting" if a prompt is open
    and this request cannot wait for it. A retry after the prompt succeeds.
    """

    def passphrase(self, source: str, /) -> bytearray:
        """Returns the key's passphrase. `source`: where it is kept, from the key's blob; see `Making.source`."""

    def pin(self, token: str, prompt: str, /) -> bytearray:
        """Returns a PIN, from a prompt or remembered from an earlier one. Blocks while prompting. `token`: identifies
        the token, the same for all its keys; `prompt`: one line for the person."""

    def verdict(self, token: str, good: bool, /) -> None:
        """Reports whether the token accepted the PIN. A wrong one is forgotten. After a few there are no more prompts
        ("pin-refused"), so that retries do not lock the token."""

    def touch(self, token: str, prompt: str, /) -> None:
        """Shows a person that the token waits for a touch. Does not block."""


class KeyHandle(Protocol):
    """An opened key. Several threads may call it at a time: it must be thread-safe."""

    def wrap(self, key: bytes, /) -> bytes:
        """Wraps a clear key of 1 to 67 bytes; returns at most 512 bytes, not fewer than `key` has. May block.

        ModuleFailed if it cannot; Refused from `Secrets` passes through. A result that does not unwrap to `key` is
        refused as "module-broke"."""

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """Unwraps what `wrap` returned; returns the clear key, 1 to 67 bytes. `wrapped` is untrusted.

        ModuleFailed if this key did not wrap it. May block."""


class KeyModule(Protocol):
    """Opens keys of one kind. Several threads may call it at a time, for different keys."""

    name: str  # the alias in auth tokens, 1 to 16 ASCII characters
    api: int  # the API version that it was written for

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        """Opens the key of an auth token and verifies that it has this signature. May block.

        `signature`: 16 hexadecimal digits, lower case. `blob`: untrusted, at most 4096 bytes, in the module's format.
        ModuleFailed if it cannot be opened; the text says why, to people, and must contain no secret. Refused from
        `secrets` passes through.
        """


# --- optional members of a handle ---------------------------------------------------------------------------


@runtime_checkable
class Watched(Protocol):
    """A handle that detects when its key must be opened again: its file changed, its token was removed."""

    def stale(self) -> bool:
        """Returns whether the key must be opened again. Called on every request: as cheap as one stat."""


@runtime_checkable
class Closable(Protocol):
    """A handle with resources to release when the key is locked or opened again."""

    def close(self) -> None:
        """Releases the resources and wipes secrets. Called once. Calls in other threads may be running; they may
        fail. Exceptions are ignored."""


@runtime_checkable
class Public(Protocol):
    """A handle whose key has a public half."""

    def export_public(self) -> bytes:
        """Returns the public key in the usual text form of its kind, such as PEM. ModuleFailed if it cannot."""


# --- optional members of a module ---------------------------------------------------------------------------


class Parameter(NamedTuple):
    """A parameter of making or importing a key: `--param name=value`."""

    name: str  # lower case, digits and "-"
    help: str  # one line
    default: str | None = None  # None: required; "": optional
    secret: bool = False  # read by a prompt, never from the command line
    choices: tuple[str, ...] = ()


class Making(NamedTuple):
    """The arguments for making or importing a key. The module must not keep any of it."""

    path: Path  # the key file to make, if the module has one: absolute, with the module's suffix, not yet existing;
    # for an import: the file to import, Path() if none was named
    values: Mapping[str, str]  # by the parameters' names, checked against choices, defaults filled in
    passphrase: bytearray  # empty: none
    source: str  # where the passphrase will be found, for the blob: "ask", "keyring", "file:/path", "none";
    # for an import also "compat": in the blob itself, for key modules that ecryptfs-utils has, too
    limits: Limits
    secrets: Secrets


class Enrolled(NamedTuple):
    """A key that was made or imported, ready for the keyring."""

    signature: str  # 16 hexadecimal digits, lower case
    blob: bytes  # for the auth token, at most 4096 bytes: the key's location; no secret
    description: str  # for people: "RSA-3072"


@runtime_checkable
class KeyMaker(Protocol):
    """A module that can make keys."""

    suffix: str  # of its key files: ".pem"; "" if it has none
    takes_passphrase: bool  # whether upcall protects its keys by a passphrase
    parameters: tuple[Parameter, ...]

    def generate(self, making: Making, /) -> Enrolled:
        """Makes a new key. Writes its file 0600, atomically, and never over another one
        (upcall.keys.private_file.write_new). ModuleFailed, UsageError or OSError if it cannot."""


class Changing(NamedTuple):
    """The arguments for changing the passphrase or PIN of a key. The module must not keep any of it."""

    path: (
        Path  # the file to write: absolute, in the folder of the key's present file, not yet existing; upcall puts it
    )
    # in that file's place afterwards. Path() for a key without a file
    passphrase: bytearray  # the new passphrase or PIN; empty: none
    source: str  # where the new passphrase will be found, for the blob: as in `Making`, "compat" included
    secrets: Secrets  # gives the present passphrase or PIN


@runtime_checkable
class PassphraseChanger(Protocol):
    """A module that can change the passphrase or PIN of its keys. If these are in files, it must import keys, too: the
    new file is proved by `import_key` before it takes the old one's place."""

    changes: str  # what protects its keys, for people: "passphrase" or "PIN"

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        """Writes the key to `changing.path`, 0600 and atomically, protected by the new passphrase. Does not touch the
        present file. A token, which has no file, changes its PIN itself, atomically.

        `signature`, `blob`: as for `open`. Returns the blob for the auth token, for the present path: the new file
        will be there. ModuleFailed if the present passphrase is wrong, or this key's cannot be changed; UsageError if
        the new one will not do; Refused from `secrets` passes through.
        """


@runtime_checkable
class KeyImporter(Protocol):
    """A module that can import existing keys: from a file, or an object in a token."""

    import_parameters: tuple[Parameter, ...]

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports an existing key after validating it completely. A file stays where it is.

        Refused("locked") if it is encrypted and `making.passphrase` is empty; call again with the passphrase.
        ModuleFailed if it is not a usable key.
        """
