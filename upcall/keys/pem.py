"""Private keys in PEM files, which `openssl pkey` and ecryptfs-utils read, too. For key modules.

Needs `cryptography`, which a module in the daemon's process has loaded anyway.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from upcall.core.errors import ModuleFailed
from upcall.keymodule import Secrets
from upcall.keys.base import NONE, wipe
from upcall.keys.private_file import read_private, write_new

if TYPE_CHECKING:  # it loads every kind of key
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_ENCRYPTED: Final = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")


def is_encrypted(pem: bytes | bytearray) -> bool:
    return any(mark in pem for mark in _ENCRYPTED)


def load_pem(pem: bytearray, passphrase: bytearray, path: str, *, trusted: bool = False) -> PrivateKeyTypes:
    """The key in the text; `path` is for people. `trusted`: RSA keys are not validated, which takes up to 220 ms.

    ModuleFailed, whose words are ours: OpenSSL's help nobody.
    """
    encrypted = is_encrypted(pem)
    try:
        return load_pem_private_key(
            pem,
            passphrase if encrypted else None,  # type: ignore[arg-type] # any buffer will do
            unsafe_skip_rsa_key_validation=trusted,
        )
    except UnsupportedAlgorithm:
        raise ModuleFailed(f"{path}: encrypted with, or for, an algorithm that is not supported") from None
    except (ValueError, TypeError, InternalError):  # the last for some damaged keys
        why = "a wrong passphrase, or a damaged PEM file" if encrypted else "not a sound private key in PEM"
        raise ModuleFailed(f"{path}: {why}") from None


class PemFile:
    """A private key in PEM, as read from its file. To be used with `with`, which wipes what was read."""

    def __init__(self, path: str, limit: int) -> None:
        """ModuleFailed if it cannot be read, is not private, or has more than `limit` bytes (see read_private)."""
        self.path = path
        try:
            self._pem, self.found = read_private(path, limit)
        except OSError as error:
            raise _failed(error, path) from error

    @property
    def encrypted(self) -> bool:
        return is_encrypted(self._pem)

    def load(self, passphrase: bytearray, *, trusted: bool = False) -> PrivateKeyTypes:
        """As `load_pem`. Of whatever kind: see `other_kind`."""
        return load_pem(self._pem, passphrase, self.path, trusted=trusted)

    def other_kind(self, name: str) -> ModuleFailed:
        """To be raised if the key is of another kind than the one that has this name for people."""
        return ModuleFailed(f"{self.path}: holds a private key, but not of {name}")

    def passphrase(self, source: str, secrets: Secrets) -> bytearray:
        """Of this file, from its source; empty if it needs none. The caller wipes it. ModuleFailed, Refused."""
        if not self.encrypted:
            return bytearray()
        if source == NONE:
            raise ModuleFailed(f"{self.path}: is encrypted, but the auth token knows of no passphrase")
        return secrets.passphrase(source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        wipe(self._pem)


def write_pem(path: Path, key: PrivateKeyTypes, passphrase: bytearray) -> None:
    """A new file (see write_new) in PKCS #8, encrypted unless the passphrase is empty. ModuleFailed."""
    encryption = BestAvailableEncryption(bytes(passphrase)) if passphrase else NoEncryption()
    pem = bytearray(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    try:
        write_new(path, pem)
    except OSError as error:
        raise _failed(error, str(path)) from error
    finally:
        wipe(pem)


def _failed(error: OSError, path: str) -> ModuleFailed:
    return ModuleFailed(f"{path}: {error.strerror}")
