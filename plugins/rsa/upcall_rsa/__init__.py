"""RSA keys in PEM files, as the openssl key module of ecryptfs-utils keeps them.

Keys are wrapped with PKCS #1 OAEP, SHA-1 and MGF1 with SHA-1: that is what lies in the headers of every file
that ecryptfs-utils ever made. OAEP does not need the hash to be free of collisions.

A handle holds the loaded key, so a request costs one RSA operation. Loading skips OpenSSL's validation, which
takes 30 to 220 ms: `enrol` and `generate` have done it, and the signature proves that it is the same key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, Hash
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from upcall.core.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.keymodule import API, MAX_KEY, MAX_WRAPPED, Enrolled, Making, Parameter, Secrets
from upcall.keys.private_file import Fingerprint, fingerprint, read_private, write_new
from upcall_rsa.blob import NONE, Blob, check_source, pack_blob, take_blob

__all__ = ["Handle", "OpensslModule", "module", "signature_of"]

MAX_FILE: Final = 64 * 1024  # bytes of a key file
MIN_BITS: Final = 2048
MIN_BITS_TO_OPEN: Final = 1024  # ecryptfs-manager made such keys: what they protect stays readable
MAX_BITS: Final = MAX_WRAPPED * 8
EXPONENT: Final = 65537
COMPAT: Final = "compat"

_OAEP = padding.OAEP(mgf=padding.MGF1(SHA1()), algorithm=SHA1(), label=None)  # noqa: S303
_ENCRYPTED = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")


def signature_of(key: rsa.RSAPublicKey) -> str:
    """16 hexadecimal digits: half of the fingerprint that the key would have in OpenPGP (RFC 4880, 12.2).

    Hashed is `0x99, u16 length, version 4, time 0, algorithm 2, MPI n, MPI e`, as ecryptfs-utils does.
    """
    numbers = key.public_numbers()
    body = b"\x04\0\0\0\0\x02" + _pack_mpi(numbers.n) + _pack_mpi(numbers.e)
    digest = Hash(SHA1())  # noqa: S303
    digest.update(b"\x99" + len(body).to_bytes(2, "big") + body)
    return digest.finalize()[:8].hex()


def _pack_mpi(number: int) -> bytes:
    bits = number.bit_length()
    return bits.to_bytes(2, "big") + number.to_bytes((bits + 7) // 8, "big")


class Handle:
    """A loaded RSA key. Its verbs release the GIL and may run in several threads at a time."""

    def __init__(self, key: rsa.RSAPrivateKey, path: str, found: Fingerprint) -> None:
        self._private, self._public = key, key.public_key()
        self._path, self._found = path, found

    def __repr__(self) -> str:
        return f"Handle({self._path!r}, RSA-{self._private.key_size})"

    def wrap(self, key: bytes, /) -> bytes:
        if not 1 <= len(key) <= MAX_KEY:
            raise ModuleFailed(f"{len(key)} bytes to wrap, 1 to {MAX_KEY} are possible")
        return self._public.encrypt(key, _OAEP)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        try:
            return self._private.decrypt(wrapped, _OAEP)
        except ValueError:
            pass  # raised anew outside: OpenSSL's error queue is no part of what people should see
        raise ModuleFailed(f"{self._path}: this key did not wrap these {len(wrapped)} bytes")

    def stale(self) -> bool:
        try:
            return fingerprint(os.stat(self._path)) != self._found  # noqa: PTH116  a third of Path's cost
        except OSError:
            return True

    def export_public(self) -> bytes:
        """SubjectPublicKeyInfo in PEM, as `openssl pkey -pubout` writes it."""
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class OpensslModule:
    """A KeyModule, a KeyMaker and a KeyImporter."""

    name = "openssl"
    api = API
    suffix = ".pem"
    takes_passphrase = True
    parameters: tuple[Parameter, ...] = (
        Parameter("bits", "Size of the key in bits.", "3072", choices=("2048", "3072", "4096")),
    )
    import_parameters: tuple[Parameter, ...] = ()

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        try:
            told = take_blob(blob)
        except PeerError as error:
            raise ModuleFailed(str(error)) from error
        pem, found = _read(told.path)
        passphrase = bytearray()
        try:
            if _is_encrypted(pem):
                passphrase = _passphrase(told, secrets)
            key = _load(pem, passphrase, told.path, trusted=True)
        finally:
            _wipe(pem)
            _wipe(passphrase)
        _check_size(key, told.path, MIN_BITS_TO_OPEN)
        if (theirs := signature_of(key.public_key())) != signature:
            raise ModuleFailed(f"{told.path}: holds the key {theirs}, the auth token is for {signature}")
        return Handle(key, told.path, found)

    def generate(self, making: Making, /) -> Enrolled:
        """An empty passphrase with the source `none` leaves the key file unencrypted."""
        passphrase, source, path, bits = making.passphrase, making.source, making.path, int(making.values["bits"])
        check_source(source)
        if bool(passphrase) is (source == NONE):
            raise UsageError("a key file has a passphrase, or the source `none`")
        path = Path(os.path.abspath(path))  # noqa: PTH100  resolve() would follow symbolic links
        blob = pack_blob(Blob(str(path), source))
        key = rsa.generate_private_key(EXPONENT, bits)
        _self_test(key, str(path))
        pem = bytearray(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _encryption(passphrase)))
        try:
            write_new(path, pem)
        except OSError as error:
            raise _failed(error, str(path)) from error
        finally:
            _wipe(pem)
        return Enrolled(signature_of(key.public_key()), blob, f"RSA-{bits}")

    def import_key(self, making: Making, /) -> Enrolled:
        """An existing PEM file; it stays where it is.

        One that is not encrypted gets the source `none`, whatever `source` says. With the source `compat` the blob
        holds the passphrase itself, as ecryptfs-utils has it.
        """
        if making.path == Path():
            raise UsageError("an RSA key is imported from a file")
        passphrase = making.passphrase
        source = None if making.source == COMPAT else making.source
        name = os.path.abspath(making.path)  # noqa: PTH100  as above
        pem, _ = _read(name)
        try:
            encrypted = _is_encrypted(pem)
            if encrypted and not passphrase:
                raise Refused("locked")
            key = _load(pem, passphrase, name, trusted=False)
        finally:
            _wipe(pem)
        _check_size(key, name, MIN_BITS)
        _self_test(key, name)
        kept = source if encrypted else NONE
        blob = pack_blob(Blob(name, kept, bytes(passphrase) if kept is None else b""))
        return Enrolled(signature_of(key.public_key()), blob, f"RSA-{key.key_size}")


def _passphrase(told: Blob, secrets: Secrets) -> bytearray:
    if told.source is None:
        return bytearray(told.passphrase)
    if told.source == NONE:
        raise ModuleFailed(f"{told.path}: is encrypted, but the auth token knows of no passphrase")
    return secrets.passphrase(told.source)


def _read(path: str) -> tuple[bytearray, Fingerprint]:
    try:
        return read_private(path, MAX_FILE)
    except OSError as error:
        raise _failed(error, path) from error


def _is_encrypted(pem: bytearray) -> bool:
    return any(mark in pem for mark in _ENCRYPTED)


def _load(pem: bytearray, passphrase: bytearray, path: str, *, trusted: bool) -> rsa.RSAPrivateKey:
    """The key in the PEM, validated unless `trusted`. OpenSSL's own words stay inside: they help nobody."""
    encrypted = _is_encrypted(pem)
    try:
        key = load_pem_private_key(
            pem,
            passphrase if encrypted else None,  # type: ignore[arg-type] # any buffer will do
            unsafe_skip_rsa_key_validation=trusted,
        )
    except UnsupportedAlgorithm:
        raise ModuleFailed(f"{path}: encrypted with, or for, an algorithm that is not supported") from None
    except (ValueError, TypeError, InternalError):  # the last for some damaged keys of other kinds
        why = "a wrong passphrase, or a damaged PEM file" if encrypted else "not a sound private key in PEM"
        raise ModuleFailed(f"{path}: {why}") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ModuleFailed(f"{path}: holds a private key, but not of RSA")
    return key


def _check_size(key: rsa.RSAPrivateKey, path: str, least: int) -> None:
    if not least <= key.key_size <= MAX_BITS:
        raise ModuleFailed(f"{path}: RSA-{key.key_size}, {least} to {MAX_BITS} bits are allowed")


def _self_test(key: rsa.RSAPrivateKey, path: str) -> None:
    """The longest key that eCryptfs could send, there and back."""
    clear = os.urandom(MAX_KEY)
    if key.decrypt(key.public_key().encrypt(clear, _OAEP), _OAEP) != clear:
        raise ModuleFailed(f"{path}: the key does not unwrap what it wrapped")


def _encryption(passphrase: bytearray) -> KeySerializationEncryption:
    return BestAvailableEncryption(bytes(passphrase)) if passphrase else NoEncryption()


def _failed(error: OSError, path: str) -> ModuleFailed:
    return ModuleFailed(f"{path}: {error.strerror}")


def _wipe(buffer: bytearray) -> None:
    """Overwrites in place. Copies that libraries or the interpreter made are out of reach."""
    buffer[:] = bytes(len(buffer))


module = OpensslModule()
