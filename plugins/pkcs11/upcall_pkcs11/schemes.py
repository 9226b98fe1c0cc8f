"""Implements the wrapping schemes: wrapping with the public half, in software; unwrapping with the private half, in
the token.

RSA: PKCS #1 OAEP without a label. With SHA-1 the format is that of ecryptfs-utils' openssl key module, so a key that
was moved into a token can still unwrap its files' keys.

EC: `u8 version 1, ephemeral public point (X9.62, uncompressed), AES-256-GCM ciphertext and tag`. Key and nonce are
HKDF-SHA256 of the ECDH secret (SP 800-56A, one ephemeral key for each wrapping), with both points in `info`. A derived
nonce is safe because each key is used once.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import pkcs11
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11.mechanisms import KDF, MGF

from upcall.core.errors import ModuleFailed
from upcall.keymodule import MAX_KEY, Limits
from upcall_pkcs11.blob import Scheme

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

MIN_BITS: Final = 2048
MAX_BITS: Final = 4096
_VERSION: Final = b"\x01"
_TAG: Final = 16
_INFO: Final = b"upcall-pkcs11 ECDH HKDF-SHA256 AES-256-GCM 1\0"
_SIGNED: Final = b"upcall-pkcs11 key\0"
CURVES: Final[dict[str, type[ec.EllipticCurve]]] = {"p-256": ec.SECP256R1, "p-384": ec.SECP384R1}


class NotOurs(Exception):
    """The wrapped key was not wrapped by this key."""


class Wrapping(Protocol):
    """A scheme with its public key. The caller of `unwrap` holds the library's lock."""

    attribute: pkcs11.Attribute  # permission that the private half needs

    def size(self, key: int) -> int:
        """Returns the wrapped size of a key of `key` bytes; 0 if it cannot be wrapped."""

    def wrap(self, key: bytes) -> bytes: ...
    def check(self, wrapped: bytes) -> None:
        """Checks the format without the token. NotOurs."""

    def unwrap(self, private: pkcs11.PrivateKey, wrapped: bytes) -> bytes:
        """Unwraps in the token. NotOurs, PKCS11Error."""


class _Hash(NamedTuple):
    digest: type[SHA1] | type[SHA256]
    mechanism: pkcs11.Mechanism
    mgf: MGF


_HASHES = {
    Scheme.RSA_OAEP_SHA1: _Hash(SHA1, pkcs11.Mechanism.SHA_1, MGF.SHA1),
    Scheme.RSA_OAEP_SHA256: _Hash(SHA256, pkcs11.Mechanism.SHA256, MGF.SHA256),
}


class RsaOaep:
    attribute = pkcs11.Attribute.DECRYPT

    def __init__(self, public: rsa.RSAPublicKey, scheme: Scheme) -> None:
        digest, mechanism, mgf = _HASHES[scheme]
        self._public, self._bytes = public, public.key_size // 8
        self._most = self._bytes - 2 * digest.digest_size - 2
        self._padding = padding.OAEP(padding.MGF1(digest()), digest(), None)
        self._param = (mechanism, mgf, None)

    def size(self, key: int) -> int:
        return self._bytes if key <= self._most else 0

    def wrap(self, key: bytes) -> bytes:
        return self._public.encrypt(key, self._padding)

    def check(self, wrapped: bytes) -> None:
        if len(wrapped) != self._bytes:
            raise NotOurs

    def unwrap(self, private: pkcs11.PrivateKey, wrapped: bytes) -> bytes:
        return private.decrypt(  # type: ignore[attr-defined, no-any-return]
            wrapped,
            mechanism=pkcs11.Mechanism.RSA_PKCS_OAEP,
            mechanism_param=self._param,
            buffer_size=self._bytes,
        )


class Ecdh:
    attribute = pkcs11.Attribute.DERIVE

    def __init__(self, public: ec.EllipticCurvePublicKey) -> None:
        self._public, self._point = public, _point(public)
        self._field = (public.key_size + 7) // 8
        self._head = 1 + len(self._point)

    def size(self, key: int) -> int:
        return self._head + key + _TAG

    def wrap(self, key: bytes) -> bytes:
        ephemeral = ec.generate_private_key(self._public.curve)
        point = _point(ephemeral.public_key())
        cipher, nonce = self._cipher(ephemeral.exchange(ec.ECDH(), self._public), point)
        return _VERSION + point + cipher.encrypt(nonce, key, _VERSION)

    def check(self, wrapped: bytes) -> None:
        if not self._head + _TAG < len(wrapped) <= self.size(MAX_KEY) or wrapped[:1] != _VERSION:
            raise NotOurs
        try:  # some tokens do not check that a point is on the curve
            ec.EllipticCurvePublicKey.from_encoded_point(self._public.curve, wrapped[1 : self._head])
        except ValueError:
            raise NotOurs from None

    def unwrap(self, private: pkcs11.PrivateKey, wrapped: bytes) -> bytes:
        point = wrapped[1 : self._head]
        cipher, nonce = self._cipher(self._secret(private, point), point)
        try:
            return cipher.decrypt(nonce, wrapped[self._head :], _VERSION)
        except InvalidTag:
            raise NotOurs from None

    def _secret(self, private: pkcs11.PrivateKey, point: bytes) -> bytes:
        """Computes the ECDH secret in the token: the x coordinate, padded, because some tokens drop leading zeros."""
        derived = private.derive_key(  # type: ignore[attr-defined]
            pkcs11.KeyType.GENERIC_SECRET,
            self._field * 8,
            mechanism=pkcs11.Mechanism.ECDH1_DERIVE,
            mechanism_param=(KDF.NULL, None, point),
            template={
                pkcs11.Attribute.TOKEN: False,
                pkcs11.Attribute.SENSITIVE: False,
                pkcs11.Attribute.EXTRACTABLE: True,
            },
        )
        try:
            return bytes(derived[pkcs11.Attribute.VALUE]).rjust(self._field, b"\0")
        finally:
            derived.destroy()  # otherwise it would stay until the session's end

    def _cipher(self, secret: bytes, point: bytes) -> tuple[AESGCM, bytes]:
        derived = HKDF(SHA256(), 44, None, _INFO + point + self._point).derive(secret)
        return AESGCM(derived[:32]), derived[32:]


def _point(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def scheme_of(public: PublicKey, digest: str) -> Scheme:
    """Returns the scheme for a new key. `digest`: "sha1" or "sha256", for RSA."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        return Scheme.ECDH_HKDF_SHA256_AES256_GCM
    return Scheme.RSA_OAEP_SHA256 if digest == "sha256" else Scheme.RSA_OAEP_SHA1


def wrapping(public: PublicKey, scheme: Scheme) -> Wrapping:
    """Returns the scheme's implementation. ModuleFailed if the key does not support it."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        if scheme is Scheme.ECDH_HKDF_SHA256_AES256_GCM and isinstance(public.curve, tuple(CURVES.values())):
            return Ecdh(public)
    elif scheme in _HASHES:
        return RsaOaep(public, scheme)
    raise ModuleFailed(f"{name_of(public)}: cannot wrap by {scheme.name}")


def check_limits(public: PublicKey, scheme: Scheme, limits: Limits) -> None:
    """ModuleFailed unless every key that the caller may pass can be wrapped, within the limits."""
    if isinstance(public, rsa.RSAPublicKey) and not MIN_BITS <= public.key_size <= MAX_BITS:
        raise ModuleFailed(f"{name_of(public)}, {MIN_BITS} to {MAX_BITS} bits are allowed")
    size = wrapping(public, scheme).size(limits.key)
    if not 0 < size <= limits.wrapped:
        raise ModuleFailed(f"{name_of(public)}: cannot wrap {limits.key} bytes into {limits.wrapped}")


def name_of(public: PublicKey) -> str:
    if isinstance(public, rsa.RSAPublicKey):
        return f"RSA-{public.key_size}"
    names = [name for name, curve in CURVES.items() if isinstance(public.curve, curve)]
    return "EC " + (names[0].upper() if names else public.curve.name)


def signature_of(public: PublicKey, scheme: Scheme) -> str:
    """Returns the signature, 16 hexadecimal digits.

    RSA with SHA-1: half of the key's OpenPGP fingerprint (RFC 4880, 12.2), over `0x99, u16 length, version 4, time 0,
    algorithm 2, MPI n, MPI e`, as in ecryptfs-utils. Others: 8 bytes of SHA-256 over a name, the scheme and the
    SubjectPublicKeyInfo, so that the signature depends on the scheme.
    """
    if isinstance(public, rsa.RSAPublicKey) and scheme is Scheme.RSA_OAEP_SHA1:
        numbers = public.public_numbers()
        body = b"\x04\0\0\0\0\x02" + _pack_mpi(numbers.n) + _pack_mpi(numbers.e)
        digest = Hash(SHA1())  # noqa: S303
        digest.update(b"\x99" + len(body).to_bytes(2, "big") + body)
    else:
        digest = Hash(SHA256())
        digest.update(_SIGNED + bytes([scheme]))
        digest.update(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize()[:8].hex()


def _pack_mpi(number: int) -> bytes:
    bits = number.bit_length()
    return bits.to_bytes(2, "big") + number.to_bytes((bits + 7) // 8, "big")
