"""Reads and writes private keys in PEM files, for key modules. `openssl pkey` and ecryptfs-utils read them, too.

Needs `cryptography`, which such modules have loaded anyway.
"""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Iterator
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

# One call of OpenSSL derives the key from the passphrase. It takes as long as the file says, and no signal ends it. So
# there are limits: a few seconds of processor time, and 1 GiB of memory.
_MOST_ROUNDS: Final = 5_000_000  # of PBKDF2, and of the older schemes of PKCS #5 and #12
_MOST_SCRYPT: Final = 1 << 23  # N * r * p
_PKCS8 = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----(.*?)-----END", re.DOTALL)
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")  # its OID in DER: RFC 7914, 7
_INTEGER, _SEQUENCE = 0x02, 0x30  # tags
_DEEPEST = 8  # SEQUENCEs in each other; RFC 8018 has four
_LONGEST = 9  # bytes of an INTEGER: 64 bits and the sign


def is_encrypted(pem: bytes | bytearray) -> bool:
    """Returns whether the text contains an encrypted private key. Does not parse it."""
    return any(mark in pem for mark in _ENCRYPTED)


def load_pem(pem: bytearray, passphrase: bytearray, path: str, *, trusted: bool = False) -> PrivateKeyTypes:
    """Parses and decrypts a private key. `passphrase`: ignored unless the key is encrypted. `path`: for errors.
    `trusted`: skips the validation of RSA keys, which takes up to 220 ms.

    ModuleFailed if the passphrase is wrong or the key is malformed. Its text does not contain OpenSSL's.
    """
    encrypted = is_encrypted(pem)
    check_cost(pem, path)
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


def check_cost(pem: bytes | bytearray, path: str) -> None:
    """Checks how long it takes to try a passphrase of an encrypted PKCS #8 file. ModuleFailed if that is too long, or
    the file does not say it. `path`: for errors."""
    for block in _PKCS8.findall(pem):
        try:
            _, info, _ = _element(binascii.a2b_base64(b"".join(block.split()), strict_mode=True))
            _, algorithm, _ = _element(info)
            numbers = [*_integers(algorithm)]
            rounds = math.prod(numbers[:3]) if _SCRYPT in algorithm else numbers[0]
        except (ValueError, IndexError):
            raise ModuleFailed(f"{path}: a damaged PEM file") from None
        unit, most = ("(N * r * p) of scrypt", _MOST_SCRYPT) if _SCRYPT in algorithm else ("rounds", _MOST_ROUNDS)
        if rounds > most:
            remedy = "encrypt it again, by `openssl pkcs8 -topk8 -iter 1000000`"
            raise ModuleFailed(f"{path}: its passphrase takes {rounds} {unit}, at most {most} are accepted: {remedy}")


def _integers(der: bytes, deepest: int = _DEEPEST) -> Iterator[int]:
    """Yields the INTEGERs in DER, also those within SEQUENCEs, in their order. ValueError if it is malformed."""
    if not deepest:
        raise ValueError("too deep")
    while der:
        tag, content, der = _element(der)
        if tag == _SEQUENCE:
            yield from _integers(content, deepest - 1)
        elif tag == _INTEGER:
            if len(content) > _LONGEST:
                raise ValueError("too large")
            yield int.from_bytes(content, "big")


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Takes the first element off: its tag, its content, the rest. ValueError if it is incomplete."""
    if len(der) < 2:
        raise ValueError("incomplete")
    tag, size, start = der[0], der[1], 2
    if size & 0x80:  # the other bits are how many bytes the size has
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    if len(der) < start + size:
        raise ValueError("incomplete")
    return tag, der[start : start + size], der[start + size :]


class PemFile:
    """A private key in PEM, read from a file. A context manager: its end wipes the file's content."""

    def __init__(self, path: str, limit: int) -> None:
        """Reads the file. ModuleFailed if that fails, other users may access it, or it has more than `limit` bytes:
        see `read_private`; or as `check_cost`, so that no passphrase is asked for in vain."""
        self.path = path
        try:
            self._pem, self.found = read_private(path, limit)
        except OSError as error:
            raise _failed(error, path) from error
        check_cost(self._pem, path)

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
