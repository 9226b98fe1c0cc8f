"""What a key module is: a name, and a way to open a key; the opened key has two verbs, wrap and unwrap.

A module is any object with the members of `KeyModule`; nothing is inherited. It is found by an entry point of the
group `upcall.key_modules`, whose name is the alias that stands in the auth token (at most 16 characters). One that
loads foreign libraries says so by an entry point of the same name in the group `upcall.isolated`, and is then run in
a process of its own. Everything else here is an optional power: a second, small protocol that a module has or has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

API = 1  # the version of this page; a module states the one that it was written for
GROUP = "upcall.key_modules"
ISOLATED_GROUP = "upcall.isolated"

MAX_KEY = 67  # bytes that a caller may ask to have wrapped: cipher code, a key of 64, checksum
MAX_WRAPPED = 512  # bytes that eCryptfs has room for
MAX_BLOB = 4096  # bytes that an auth token may hold for a module: nothing sensible needs more


class Limits(NamedTuple):
    """What the caller can carry, in bytes: the longest key that it will hand over, the longest wrapped key that it
    can store. A key that cannot keep to them is refused when it is enrolled, not at the first file."""

    key: int = MAX_KEY
    wrapped: int = MAX_WRAPPED


class Secrets(Protocol):
    """What the daemon (or the command line) gets for a module. The module wipes what it was given.

    To be called in the thread that calls the module, which is known to be at work for a certain request. Each method
    may raise Refused: "locked" if the secret cannot be had now, "prompting" if a person is being asked
    and this request cannot wait for it; the next try finds the answer. Let it pass.
    """

    def passphrase(self, source: str, /) -> bytearray:
        """The key's passphrase; `source` is what the key's blob says about where it is kept."""

    def pin(self, token: str, prompt: str, /) -> bytearray:
        """A PIN that a person types, or typed a while ago. `token`: whose PIN it is, the same for all its keys."""

    def verdict(self, token: str, good: bool, /) -> None:
        """How the token took that PIN. A wrong one is forgotten; after a few, nobody is asked any more, so that
        retries do not lock the token."""

    def touch(self, token: str, prompt: str, /) -> None:
        """Tells a person that the token waits for a touch. Returns at once."""


class KeyHandle(Protocol):
    """A key that was opened once. Both verbs may be called from several threads at a time."""

    def wrap(self, key: bytes, /) -> bytes:
        """1 to 67 bytes of clear key to at most 512 wrapped ones. ModuleFailed if it cannot."""

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """The inverse. ModuleFailed if this key did not wrap it."""


class KeyModule(Protocol):
    """A way of keeping keys."""

    name: str  # the alias in auth tokens
    api: int  # API of the page it was written for

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        """The key behind an auth token's blob, read and checked against the signature.

        ModuleFailed says why it cannot be opened; no secret may stand in the text.
        """


# --- powers that a handle may have --------------------------------------------------------------------------


@runtime_checkable
class Watched(Protocol):
    """A handle that knows when it has to be opened anew: its file changed, its token was taken out."""

    def stale(self) -> bool:
        """Cheap: it is asked on every request. One stat, say."""


@runtime_checkable
class Closable(Protocol):
    """A handle that holds something to be let go when the key is locked or opened anew."""

    def close(self) -> None:
        """Once; calls in other threads may still be under way and may fail."""


@runtime_checkable
class Public(Protocol):
    """A handle with a public half."""

    def export_public(self) -> bytes:
        """In the usual text form of its kind (PEM)."""


# --- powers that a module may have --------------------------------------------------------------------------


class Parameter(NamedTuple):
    """Something to choose when a key is made or imported: `--param name=value`."""

    name: str  # lower case, digits and "-"
    help: str  # one line
    default: str | None = None  # None: it must be given; "": it may be left out
    secret: bool = False  # never on the command line: asked for
    choices: tuple[str, ...] = ()


class Making(NamedTuple):
    """What a module is given to make a key with, or to take one in. Nothing of it may be kept."""

    path: Path  # where to put the key file, if there is one: absolute, with the module's suffix, not there yet;
    # of an import: the file to import, Path() if none was named
    values: Mapping[str, str]  # by the parameters' names, checked against choices, defaults filled in
    passphrase: bytearray  # empty if there is to be none
    source: str  # for the blob: where the passphrase will be found: "ask", "keyring", "file:/path", "none";
    # of an import also "compat": in the blob itself, for modules that ecryptfs-utils has, too
    limits: Limits
    secrets: Secrets


class Enrolled(NamedTuple):
    """A key that was made or checked, ready for the keyring."""

    signature: str  # 16 hexadecimal digits, lower case
    blob: bytes  # for the auth token; it says where things are, and holds no secret
    description: str  # for people: "RSA-3072"


@runtime_checkable
class KeyMaker(Protocol):
    """A module that can make keys."""

    suffix: str  # of its key files: ".pem"; "" if it has none
    takes_passphrase: bool  # whether its keys are protected by a passphrase of ours
    parameters: tuple[Parameter, ...]

    def generate(self, making: Making, /) -> Enrolled:
        """A new key. A file is written 0600, atomically, and never over another
        (upcall.keys.private_file.write_new)."""


@runtime_checkable
class KeyImporter(Protocol):
    """A module that can take in keys that exist: a file, or an object in a token."""

    import_parameters: tuple[Parameter, ...]

    def import_key(self, making: Making, /) -> Enrolled:
        """An existing key, fully validated. A file stays where it is.

        Refused("locked") if it is encrypted and `making.passphrase` is empty: ask for it, and come again.
        """
