"""Seals keys to an X25519 public key and unseals them: HPKE (RFC 9180), base mode, single shot. Pure.

    u8 form, 32 bytes enc (the sender's ephemeral public key), the sealed key and a tag of 16 bytes

The form is 0x10, the version, plus the id that RFC 9180, 7.3 gives the AEAD. KEM and KDF are always
DHKEM(X25519, HKDF-SHA256) and HKDF-SHA256. HPKE binds the three of them, the recipient's public key and `INFO` to the
sealed key, so a key with a changed form byte cannot be unsealed.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from upcall.core.errors import PeerError
from upcall.keymodule import MAX_KEY

WHAT: Final = "sealed key"
INFO: Final = b"upcall x25519 1: a file's key"
OVERHEAD: Final = 1 + 32 + 16  # bytes by which a sealed key is longer than the key
AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305 = 0x11, 0x12, 0x13

SUITES: Final = {
    form: Suite(KEM.X25519, KDF.HKDF_SHA256, aead)
    for form, aead in (
        (AES_128_GCM, AEAD.AES_128_GCM),
        (AES_256_GCM, AEAD.AES_256_GCM),
        (CHACHA20_POLY1305, AEAD.CHACHA20_POLY1305),
    )
}


def seal(form: int, key: bytes, public: X25519PublicKey) -> bytes:
    """Seals a key. Returns `len(key)` + OVERHEAD bytes, which differ on each call."""
    return bytes((form,)) + SUITES[form].encrypt(key, public, INFO)


def unseal(sealed: bytes, private: X25519PrivateKey) -> bytes:
    """Unseals a key of 1 to 67 bytes. PeerError if it was not sealed to this key's public half, or was changed.

    Any holder of the public key can seal any bytes, so the size is checked in addition to the tag.
    """
    if not OVERHEAD < len(sealed) <= OVERHEAD + MAX_KEY:
        possible = f"{OVERHEAD + 1} to {OVERHEAD + MAX_KEY} bytes are possible"
        raise PeerError(WHAT, f"this key did not seal these {len(sealed)} bytes: {possible}")
    suite = SUITES.get(sealed[0])
    if suite is None:
        raise PeerError(WHAT, f"unknown form {sealed[0]:#04x}", 0)
    try:
        return suite.decrypt(memoryview(sealed)[1:], private, INFO)
    except InvalidTag:
        raise PeerError(WHAT, f"this key did not seal these {len(sealed)} bytes") from None
