"""Wraps keys with RSA keys in PEM files, compatible with the openssl key module of ecryptfs-utils.

Keys are wrapped with PKCS #1 OAEP, SHA-1 and MGF1 with SHA-1: the format of all files made by ecryptfs-utils. OAEP
does not rely on collision resistance of the hash.

A handle holds the loaded key, so a request costs one RSA operation. Loading skips OpenSSL's validation, which
takes 30 to 220 ms: `import_key` and `generate` have validated the key, and the signature proves that it is the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from upcall.core.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.keymodule import API, MAX_WRAPPED, Changing, Enrolled, Making, Parameter, Secrets
from upcall.keys.base import NONE, FileHandle, check_changed, check_clear, check_new, self_test, wipe
from upcall.keys.pem import PemFile, write_pem
from upcall.keys.private_file import Fingerprint
from upcall_rsa.blob import Blob, pack_blob, take_blob

__all__ = ["Handle", "OpensslModule", "module", "signature_of"]

MAX_FILE: Final = 64 * 1024  # bytes of a key file
MIN_BITS: Final = 1024  # ecryptfs-manager made such keys: their files must stay readable, until they are rewrapped
MAX_BITS: Final = MAX_WRAPPED * 8
EXPONENT: Final = 65537
COMPAT: Final = "compat"

_OAEP = padding.OAEP(mgf=padding.MGF1(SHA1()), algorithm=SHA1(), label=None)  # noqa: S303


def signature_of(key: rsa.RSAPublicKey) -> str:
    """Returns the signature, 16 hexadecimal digits: half of the key's OpenPGP fingerprint (RFC 4880, 12.2).

    Hashes `0x99, u16 length, version 4, time 0, algorithm 2, MPI n, MPI e`, as ecryptfs-utils does.
    """
    numbers = key.public_numbers()
    body = b"\x04\0\0\0\0\x02" + _pack_mpi(numbers.n) + _pack_mpi(numbers.e)
    digest = Hash(SHA1())  # noqa: S303
    digest.update(b"\x99" + len(body).to_bytes(2, "big") + body)
    return digest.finalize()[:8].hex()


def _pack_mpi(number: int) -> bytes:
    bits = number.bit_length()
    return bits.to_bytes(2, "big") + number.to_bytes((bits + 7) // 8, "big")


class Handle(FileHandle):
    """A KeyHandle of a loaded RSA key. Thread-safe; its verbs release the GIL."""

    def __init__(self, key: rsa.RSAPrivateKey, path: str, found: Fingerprint) -> None:
        super().__init__(path, found)
        self._private, self._public = key, key.public_key()

    def __repr__(self) -> str:
        return f"Handle({self._path!r}, RSA-{self._private.key_size})"

    def wrap(self, key: bytes, /) -> bytes:
        check_clear(key)
        return self._public.encrypt(key, _OAEP)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        try:
            return self._private.decrypt(wrapped, _OAEP)
        except ValueError:
            pass  # raised outside of this block, so that OpenSSL's error queue is not its context
        raise ModuleFailed(f"{self._path}: this key did not wrap these {len(wrapped)} bytes")

    def export_public(self) -> bytes:
        """Returns the SubjectPublicKeyInfo in PEM, as `openssl pkey -pubout` writes it."""
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class OpensslModule:
    """A KeyModule, KeyMaker, KeyImporter and PassphraseChanger for RSA keys in PEM files. Thread-safe."""

    name = "openssl"
    api = API
    suffix = ".pem"
    takes_passphrase = True
    changes = "passphrase"
    parameters: tuple[Parameter, ...] = (
        Parameter("bits", "Size of the key in bits.", "3072", choices=("2048", "3072", "4096")),
    )
    import_parameters: tuple[Parameter, ...] = ()

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        told = _take(blob)
        key, found = _open(told, secrets, trusted=True)
        _check_signature(key, told.path, signature)
        return Handle(key, told.path, found)

    def generate(self, making: Making, /) -> Enrolled:
        """Makes a key file. It is not encrypted if the passphrase is empty and its source is "none"."""
        check_new(making)
        bits = int(making.values["bits"])
        path = Path(os.path.abspath(making.path))  # noqa: PTH100  resolve() would follow symbolic links
        blob = pack_blob(Blob(str(path), making.source))
        key = rsa.generate_private_key(EXPONENT, bits)
        _self_test(key, str(path))
        write_pem(path, key, making.passphrase)
        return Enrolled(signature_of(key.public_key()), blob, f"RSA-{bits}")

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports an existing PEM file, which stays where it is.

        If it is not encrypted, the source is "none", whatever `making` says. With the source "compat" the blob
        contains the passphrase itself, as with ecryptfs-utils.
        """
        if making.path == Path():
            raise UsageError("an RSA key is imported from a file")
        passphrase = making.passphrase
        source = None if making.source == COMPAT else making.source
        name = os.path.abspath(making.path)  # noqa: PTH100  as above
        with PemFile(name, MAX_FILE) as file:
            encrypted = file.encrypted
            if encrypted and not passphrase:
                raise Refused("locked")
            key = _load(file, passphrase, trusted=False)
        _check_size(key, name)
        _self_test(key, name)
        kept = source if encrypted else NONE
        blob = pack_blob(Blob(name, kept, bytes(passphrase) if kept is None else b""))
        return Enrolled(signature_of(key.public_key()), blob, f"RSA-{key.key_size}")

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        told = _take(blob)
        kept = changing.passphrase if changing.source == COMPAT else bytearray()
        source = None if kept else changing.source
        check_changed(changing, compat=True)
        new = pack_blob(Blob(told.path, source, bytes(kept)))
        key, _ = _open(told, changing.secrets, trusted=False)
        _check_signature(key, told.path, signature)
        write_pem(changing.path, key, changing.passphrase)
        return new


def _take(blob: bytes) -> Blob:
    try:
        return take_blob(blob)
    except PeerError as error:
        raise ModuleFailed(str(error)) from error


def _open(told: Blob, secrets: Secrets, *, trusted: bool) -> tuple[rsa.RSAPrivateKey, Fingerprint]:
    with PemFile(told.path, MAX_FILE) as file:
        kept, source = told.passphrase, told.source
        passphrase = bytearray(kept) if source is None else file.passphrase(source, secrets)
        try:
            key = _load(file, passphrase, trusted=trusted)
        finally:
            wipe(passphrase)
    _check_size(key, told.path)
    return key, file.found


def _check_signature(key: rsa.RSAPrivateKey, path: str, signature: str) -> None:
    if (theirs := signature_of(key.public_key())) != signature:
        raise ModuleFailed(f"{path}: holds the key {theirs}, the auth token is for {signature}")


def _load(file: PemFile, passphrase: bytearray, *, trusted: bool) -> rsa.RSAPrivateKey:
    key = file.load(passphrase, trusted=trusted)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise file.other_kind("RSA")
    return key


def _check_size(key: rsa.RSAPrivateKey, path: str) -> None:
    if not MIN_BITS <= key.key_size <= MAX_BITS:
        raise ModuleFailed(f"{path}: RSA-{key.key_size}, {MIN_BITS} to {MAX_BITS} bits are allowed")


def _self_test(key: rsa.RSAPrivateKey, path: str) -> None:
    public = key.public_key()
    self_test(lambda clear: public.encrypt(clear, _OAEP), lambda wrapped: key.decrypt(wrapped, _OAEP), path)


module = OpensslModule()
