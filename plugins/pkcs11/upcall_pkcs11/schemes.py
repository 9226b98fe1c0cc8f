"""How a key in a token wraps: with the public half, here; and unwraps: with the private half, in there.

RSA: PKCS #1 OAEP without a label. With SHA-1 the wrapped form is that of ecryptfs-utils' openssl key module, so
that a key that moves into a token keeps opening the files that it has wrapped.

EC: `u8 version 1, ephemeral public point (X9.62, uncompressed), AES-256-GCM ciphertext and tag`. Key and nonce are
HKDF-SHA256 of the ECDH secret (SP 800-56A, one ephemeral key for each wrapping), with both points in `info`; that
the key is used once makes a derived nonce safe.
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
    """What was to be unwrapped was not wrapped by this key. No token is needed to see it."""


class Wrapping(Protocol):
    """A public key and what is done with it. `unwrap` wants its private half, and whoever calls it the lock."""

    attribute: pkcs11.Attribute  # what the private half must be allowed to do

    def size(self, key: int) -> int:
        """Bytes of wrapped key for so many of clear key; 0 if that many cannot be wrapped."""

    def wrap(self, key: bytes) -> bytes: ...
    def check(self, wrapped: bytes) -> None:
        """NotOurs, without asking the token."""

    def unwrap(self, private: pkcs11.PrivateKey, wrapped: bytes) -> bytes:
        """NotOurs or PKCS11Error."""


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
        try:  # tokens differ in whether they look if a point lies on the curve
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
        """The x coordinate. Some tokens drop its leading zeros."""
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
            derived.destroy()  # the session lives long

    def _cipher(self, secret: bytes, point: bytes) -> tuple[AESGCM, bytes]:
        derived = HKDF(SHA256(), 44, None, _INFO + point + self._point).derive(secret)
        return AESGCM(derived[:32]), derived[32:]


def _point(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def scheme_of(public: PublicKey, digest: str) -> Scheme:
    """For a key that is being enrolled; `digest`, "sha1" or "sha256", is for RSA."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        return Scheme.ECDH_HKDF_SHA256_AES256_GCM
    return Scheme.RSA_OAEP_SHA256 if digest == "sha256" else Scheme.RSA_OAEP_SHA1


def wrapping(public: PublicKey, scheme: Scheme) -> Wrapping:
    """ModuleFailed if this key cannot wrap in that way."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        if scheme is Scheme.ECDH_HKDF_SHA256_AES256_GCM and isinstance(public.curve, tuple(CURVES.values())):
            return Ecdh(public)
    elif scheme in _HASHES:
        return RsaOaep(public, scheme)
    raise ModuleFailed(f"{name_of(public)}: cannot wrap by {scheme.name}")


def check_limits(public: PublicKey, scheme: Scheme, limits: Limits) -> None:
    """ModuleFailed unless every key that a caller may bring can be wrapped and stored."""
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
    """16 hexadecimal digits.

    RSA with SHA-1: half of the fingerprint that the key would have in OpenPGP (RFC 4880, 12.2), over `0x99, u16
    length, version 4, time 0, algorithm 2, MPI n, MPI e`, as ecryptfs-utils has it. All others: 8 bytes of SHA-256
    over a name, the scheme and the SubjectPublicKeyInfo, so that a signature says how its key wraps.
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
