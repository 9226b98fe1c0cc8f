"""X25519 keys in PEM files; a file's key is wrapped with HPKE (RFC 9180), in the form of `upcall_x25519.sealed`.

A handle holds the loaded key, so that a request costs one or two multiplications on the curve, 35 to 55 us:
it is done on the thread that asks. Every 32 bytes are an X25519 private key, so the signature in the auth token is
what shows that the right one was loaded.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
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
from upcall.keymodule import API, MAX_KEY, Enrolled, Making, Parameter, Secrets
from upcall.keys.private_file import Fingerprint, fingerprint, read_private, write_new
from upcall_x25519.blob import NONE, Blob, check_source, pack_blob, take_blob
from upcall_x25519.sealed import AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305, OVERHEAD, seal, unseal

__all__ = ["Handle", "X25519Module", "module", "signature_of"]

MAX_FILE: Final = 16 * 1024  # bytes of a key file; one of ours has about 300
DESCRIPTION: Final = "X25519"
FORMS: Final = {"aes-256-gcm": AES_256_GCM, "aes-128-gcm": AES_128_GCM, "chacha20-poly1305": CHACHA20_POLY1305}

_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
_SIGNED = b"upcall x25519 1: signature\0"


def signature_of(key: X25519PublicKey) -> str:
    """16 hexadecimal digits: the first 8 bytes of SHA-256 over `_SIGNED` and the 32 bytes of the public key."""
    digest = Hash(SHA256())
    digest.update(_SIGNED + key.public_bytes_raw())
    return digest.finalize()[:8].hex()


class Handle:
    """A loaded X25519 key. Nothing in it changes: both verbs may run in several threads at a time."""

    def __init__(self, key: X25519PrivateKey, form: int, path: str, found: Fingerprint) -> None:
        self._private, self._public, self._form = key, key.public_key(), form
        self._path, self._found = path, found

    def __repr__(self) -> str:
        return f"Handle({self._path!r}, {DESCRIPTION})"

    def wrap(self, key: bytes, /) -> bytes:
        """`len(key)` + 49 bytes; two of the same key differ."""
        if not 1 <= len(key) <= MAX_KEY:
            raise ModuleFailed(f"{len(key)} bytes to wrap, 1 to {MAX_KEY} are possible")
        return seal(self._form, key, self._public)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """Of any form, whatever form this handle wraps in."""
        try:
            return unseal(wrapped, self._private)
        except PeerError as error:
            raise ModuleFailed(f"{self._path}: {error}") from None

    def stale(self) -> bool:
        try:
            return fingerprint(os.stat(self._path)) != self._found  # noqa: PTH116  a third of Path's cost
        except OSError:
            return True

    def export_public(self) -> bytes:
        """SubjectPublicKeyInfo (RFC 8410) in PEM."""
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


_CIPHER = Parameter("cipher", "Cipher that new files' keys are sealed with.", "aes-256-gcm", choices=tuple(FORMS))


class X25519Module:
    """A KeyModule, a KeyMaker and a KeyImporter."""

    name = "x25519"
    api = API
    suffix = ".pem"
    takes_passphrase = True
    parameters: tuple[Parameter, ...] = (_CIPHER,)
    import_parameters: tuple[Parameter, ...] = (_CIPHER,)

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        try:
            told = take_blob(blob)
        except PeerError as error:
            raise ModuleFailed(str(error)) from error
        pem, found = _read(told.path)
        passphrase = bytearray()
        try:
            if _ENCRYPTED in pem:
                if told.source == NONE:
                    raise ModuleFailed(f"{told.path}: is encrypted, but the auth token knows of no passphrase")
                passphrase = secrets.passphrase(told.source)
            key = _load(pem, passphrase, told.path)
        finally:
            _wipe(pem)
            _wipe(passphrase)
        if (theirs := signature_of(key.public_key())) != signature:
            raise ModuleFailed(f"{told.path}: holds the key {theirs}, the auth token is for {signature}")
        return Handle(key, told.form, told.path, found)

    def generate(self, making: Making, /) -> Enrolled:
        """A new key in PKCS #8. An empty passphrase with the source `none` leaves the file unencrypted."""
        check_source(making.source)
        if bool(making.passphrase) is (making.source == NONE):
            raise UsageError("a key file has a passphrase, or the source `none`")
        form = _form(making)
        path = making.path.absolute()
        blob = pack_blob(Blob(str(path), making.source, form))
        key = X25519PrivateKey.generate()
        _self_test(key, form, str(path))
        pem = bytearray(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _encryption(making.passphrase)))
        try:
            write_new(path, pem)
        except OSError as error:
            raise _failed(error, str(path)) from error
        finally:
            _wipe(pem)
        return Enrolled(signature_of(key.public_key()), blob, DESCRIPTION)

    def import_key(self, making: Making, /) -> Enrolled:
        """An existing PKCS #8 file. One that is not encrypted gets the source `none`, whatever `source` says."""
        form, path = _form(making), str(making.path.absolute())
        pem, _ = _read(path)
        try:
            encrypted = _ENCRYPTED in pem
            if encrypted and not making.passphrase:
                raise Refused("locked")
            if encrypted and making.source == NONE:
                raise UsageError(f"{path}: is encrypted: its passphrase must be kept somewhere")
            key = _load(pem, making.passphrase, path)
        finally:
            _wipe(pem)
        _self_test(key, form, path)
        blob = pack_blob(Blob(path, making.source if encrypted else NONE, form))
        return Enrolled(signature_of(key.public_key()), blob, DESCRIPTION)


def _form(making: Making) -> int:
    """What the longest key is wrapped into must fit the caller; a shorter one then does, too."""
    needed = making.limits.key + OVERHEAD
    if needed > making.limits.wrapped:
        raise ModuleFailed(f"a wrapped key has up to {needed} bytes, there is room for {making.limits.wrapped}")
    cipher = making.values.get(_CIPHER.name, "")
    if cipher not in FORMS:
        raise UsageError(f"{cipher!r} is no cipher of {', '.join(FORMS)}")
    return FORMS[cipher]


def _read(path: str) -> tuple[bytearray, Fingerprint]:
    try:
        return read_private(path, MAX_FILE)
    except OSError as error:
        raise _failed(error, path) from error


def _load(pem: bytearray, passphrase: bytearray, path: str) -> X25519PrivateKey:
    """The key in the PEM. OpenSSL's own words stay inside: they help nobody."""
    encrypted = _ENCRYPTED in pem
    try:
        key = load_pem_private_key(pem, passphrase if encrypted else None)  # type: ignore[arg-type] # any buffer
    except UnsupportedAlgorithm:
        raise ModuleFailed(f"{path}: encrypted with, or for, an algorithm that is not supported") from None
    except (ValueError, TypeError, InternalError):  # InternalError: a private key that has not 32 bytes
        why = "a wrong passphrase, or a damaged PEM file" if encrypted else "not a sound private key in PEM"
        raise ModuleFailed(f"{path}: {why}") from None
    if not isinstance(key, X25519PrivateKey):
        raise ModuleFailed(f"{path}: holds a private key, but not of X25519")
    return key


def _self_test(key: X25519PrivateKey, form: int, path: str) -> None:
    """The longest key that eCryptfs could send, there and back."""
    clear = os.urandom(MAX_KEY)
    if unseal(seal(form, clear, key.public_key()), key) != clear:
        raise ModuleFailed(f"{path}: the key does not unwrap what it wrapped")


def _encryption(passphrase: bytearray) -> KeySerializationEncryption:
    return BestAvailableEncryption(bytes(passphrase)) if passphrase else NoEncryption()


def _failed(error: OSError, path: str) -> ModuleFailed:
    return ModuleFailed(f"{path}: {error.strerror}")


def _wipe(buffer: bytearray) -> None:
    """Overwrites in place. Copies that libraries or the interpreter made are out of reach."""
    buffer[:] = bytes(len(buffer))


module = X25519Module()
