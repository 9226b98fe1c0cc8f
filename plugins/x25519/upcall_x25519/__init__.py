"""Wraps keys with X25519 keys in PEM files, by HPKE (RFC 9180), in the format of `upcall_x25519.sealed`.

A handle holds the loaded key, so a request costs one or two multiplications on the curve, 35 to 55 us, in the calling
thread. Any 32 bytes are an X25519 private key, so only the signature in the auth token shows that the right one was
loaded.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from upcall.core.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.keymodule import API, Changing, Enrolled, Making, Parameter, Secrets
from upcall.keys.base import NONE, FileHandle, check_changed, check_clear, check_new, check_room, self_test, wipe
from upcall.keys.pem import PemFile, write_pem
from upcall.keys.private_file import Fingerprint
from upcall_x25519.blob import Blob, pack_blob, take_blob
from upcall_x25519.sealed import AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305, OVERHEAD, seal, unseal

__all__ = ["Handle", "X25519Module", "module", "signature_of"]

MAX_FILE: Final = 16 * 1024  # bytes of a key file; one made by this module has about 300
DESCRIPTION: Final = "X25519"
FORMS: Final = {"aes-256-gcm": AES_256_GCM, "aes-128-gcm": AES_128_GCM, "chacha20-poly1305": CHACHA20_POLY1305}

_SIGNED = b"upcall x25519 1: signature\0"


def signature_of(key: X25519PublicKey) -> str:
    """Returns the signature, 16 hexadecimal digits: the first 8 bytes of SHA-256 over `_SIGNED` and the 32 bytes of
    the public key."""
    digest = Hash(SHA256())
    digest.update(_SIGNED + key.public_bytes_raw())
    return digest.finalize()[:8].hex()


class Handle(FileHandle):
    """A KeyHandle of a loaded X25519 key. Immutable, therefore thread-safe."""

    def __init__(self, key: X25519PrivateKey, form: int, path: str, found: Fingerprint) -> None:
        super().__init__(path, found)
        self._private, self._public, self._form = key, key.public_key(), form

    def __repr__(self) -> str:
        return f"Handle({self._path!r}, {DESCRIPTION})"

    def wrap(self, key: bytes, /) -> bytes:
        """Wraps a key. Returns `len(key)` + 49 bytes, which differ on each call."""
        check_clear(key)
        return seal(self._form, key, self._public)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """Unwraps a key of any form, also of another one than this handle wraps to."""
        try:
            return unseal(wrapped, self._private)
        except PeerError as error:
            raise ModuleFailed(f"{self._path}: {error}") from None

    def export_public(self) -> bytes:
        """Returns the SubjectPublicKeyInfo (RFC 8410) in PEM."""
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


_CIPHER = Parameter("cipher", "Cipher that new files' keys are sealed with.", "aes-256-gcm", choices=tuple(FORMS))


class X25519Module:
    """A KeyModule, KeyMaker, KeyImporter and PassphraseChanger for X25519 keys in PEM files. Thread-safe."""

    name = "x25519"
    api = API
    suffix = ".pem"
    takes_passphrase = True
    changes = "passphrase"
    parameters: tuple[Parameter, ...] = (_CIPHER,)
    import_parameters: tuple[Parameter, ...] = (_CIPHER,)

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        told = _take(blob)
        key, found = _open(told, signature, secrets)
        return Handle(key, told.form, told.path, found)

    def generate(self, making: Making, /) -> Enrolled:
        """Makes a key file in PKCS #8. It is not encrypted if the passphrase is empty and its source is "none"."""
        check_new(making)
        form = _form(making)
        path = making.path.absolute()
        blob = pack_blob(Blob(str(path), making.source, form))
        key = X25519PrivateKey.generate()
        _self_test(key, form, str(path))
        write_pem(path, key, making.passphrase)
        return Enrolled(signature_of(key.public_key()), blob, DESCRIPTION)

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports an existing PKCS #8 file. If it is not encrypted, the source is "none", whatever `making` says."""
        form, path = _form(making), str(making.path.absolute())
        with PemFile(path, MAX_FILE) as file:
            encrypted = file.encrypted
            if encrypted and not making.passphrase:
                raise Refused("locked")
            if encrypted and making.source == NONE:
                raise UsageError(f"{path}: is encrypted: its passphrase must be kept somewhere")
            key = _load(file, making.passphrase)
        _self_test(key, form, path)
        blob = pack_blob(Blob(path, making.source if encrypted else NONE, form))
        return Enrolled(signature_of(key.public_key()), blob, DESCRIPTION)

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        told = _take(blob)
        check_changed(changing)
        new = pack_blob(told._replace(source=changing.source))
        key, _ = _open(told, signature, changing.secrets)
        write_pem(changing.path, key, changing.passphrase)
        return new


def _take(blob: bytes) -> Blob:
    try:
        return take_blob(blob)
    except PeerError as error:
        raise ModuleFailed(str(error)) from error


def _open(told: Blob, signature: str, secrets: Secrets) -> tuple[X25519PrivateKey, Fingerprint]:
    with PemFile(told.path, MAX_FILE) as file:
        passphrase = file.passphrase(told.source, secrets)
        try:
            key = _load(file, passphrase)
        finally:
            wipe(passphrase)
    if (theirs := signature_of(key.public_key())) != signature:
        raise ModuleFailed(f"{told.path}: holds the key {theirs}, the auth token is for {signature}")
    return key, file.found


def _form(making: Making) -> int:
    """Returns the form that was chosen. ModuleFailed unless the longest key, wrapped, fits the caller's limit."""
    check_room(making.limits.key + OVERHEAD, making.limits)
    cipher = making.values.get(_CIPHER.name, "")
    if cipher not in FORMS:
        raise UsageError(f"{cipher!r} is no cipher of {', '.join(FORMS)}")
    return FORMS[cipher]


def _load(file: PemFile, passphrase: bytearray) -> X25519PrivateKey:
    key = file.load(passphrase)
    if not isinstance(key, X25519PrivateKey):
        raise file.other_kind(DESCRIPTION)
    return key


def _self_test(key: X25519PrivateKey, form: int, path: str) -> None:
    public = key.public_key()
    self_test(lambda clear: seal(form, clear, public), lambda wrapped: unseal(wrapped, key), path)


module = X25519Module()
