"""Reads and writes private keys in PEM files, for key modules. `openssl pkey` and ecryptfs-utils read them, too.

Needs `cryptography`, which such modules have loaded anyway.
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

if TYPE_CHECKING:  # this import would load all key algorithms
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_ENCRYPTED: Final = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")


def is_encrypted(pem: bytes | bytearray) -> bool:
    """Returns whether the text contains an encrypted private key. Does not parse it."""
    return any(mark in pem for mark in _ENCRYPTED)


def load_pem(pem: bytearray, passphrase: bytearray, path: str, *, trusted: bool = False) -> PrivateKeyTypes:
    """Parses and decrypts a private key. `passphrase`: ignored unless the key is encrypted. `path`: for errors.
    `trusted`: skips the validation of RSA keys, which takes up to 220 ms.

    ModuleFailed if the passphrase is wrong or the key is malformed. Its text does not contain OpenSSL's.
    """
    encrypted = is_encrypted(pem)
    try:
        return load_pem_private_key(
            pem,
            passphrase if encrypted else None,  # type: ignore[arg-type] # it accepts any buffer
            unsafe_skip_rsa_key_validation=trusted,
        )
    except UnsupportedAlgorithm:
        raise ModuleFailed(f"{path}: encrypted with, or for, an algorithm that is not supported") from None
    except (ValueError, TypeError, InternalError):  # the last for some damaged keys
        why = "a wrong passphrase, or a damaged PEM file" if encrypted else "not a sound private key in PEM"
        raise ModuleFailed(f"{path}: {why}") from None


class PemFile:
    """A private key in PEM, read from a file. A context manager: its end wipes the file's content."""

    def __init__(self, path: str, limit: int) -> None:
        """Reads the file. ModuleFailed if that fails, other users may access it, or it has more than `limit` bytes:
        see `read_private`."""
        self.path = path
        try:
            self._pem, self.found = read_private(path, limit)
        except OSError as error:
            raise _failed(error, path) from error

    @property
    def encrypted(self) -> bool:
        return is_encrypted(self._pem)

    def load(self, passphrase: bytearray, *, trusted: bool = False) -> PrivateKeyTypes:
        """Parses the key as `load_pem`. The caller checks its kind: see `other_kind`."""
        return load_pem(self._pem, passphrase, self.path, trusted=trusted)

    def other_kind(self, name: str) -> ModuleFailed:
        """Returns the exception to raise if the key is of another kind. `name`: of the expected kind, for people."""
        return ModuleFailed(f"{self.path}: holds a private key, but not of {name}")

    def passphrase(self, source: str, secrets: Secrets) -> bytearray:
        """Obtains the file's passphrase; the caller wipes it. Empty if the file is not encrypted. `source`: as in the
        blob. ModuleFailed if the source is "none"; Refused as `secrets.passphrase`."""
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
    """Writes a key to a new file (see `write_new`), in PKCS #8, encrypted unless the passphrase is empty. ModuleFailed
    if the file exists or cannot be written."""
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
