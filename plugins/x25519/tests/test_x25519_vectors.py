"""RFC 9180's and RFC 7748's own values, and HPKE written down a second time, from the RFC, to check ours with.

The RFC's encryptions have associated data, ours have none. So the second HPKE is proved by the RFC's values,
and then it and the key module have to read each other, in every form.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)
from upcall_x25519 import module, signature_of
from upcall_x25519.blob import Blob, pack_blob
from upcall_x25519.sealed import INFO, SUITES, seal, unseal

from upcall.core.errors import PeerError
from upcall.testing.secrets import GivenSecrets

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "rfc9180.json").read_text())["vectors"]
NAMED = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"].split(":")[0])
AEADS: dict[int, tuple[type[AESGCM] | type[ChaCha20Poly1305], int]] = {
    1: (AESGCM, 16),
    2: (AESGCM, 32),
    3: (ChaCha20Poly1305, 32),
}


# --- HPKE, once more: RFC 9180, 4 and 5.1 ---------------------------------------------------------------------


def extract(salt: bytes, suite: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")


def expand(prk: bytes, suite: bytes, label: bytes, info: bytes, size: int) -> bytes:
    assert size <= 32  # one block is enough for all of base mode
    labeled = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, labeled + b"\x01", "sha256")[:size]


def shared_secret(dh: bytes, enc: bytes, recipient: bytes) -> bytes:
    suite = b"KEM\x00\x20"
    return expand(extract(b"", suite, b"eae_prk", dh), suite, b"shared_secret", enc + recipient, 32)


def key_and_nonce(secret: bytes, aead: int, info: bytes) -> tuple[bytes, bytes]:
    suite = b"HPKE\x00\x20\x00\x01" + aead.to_bytes(2, "big")
    context = b"\x00" + extract(b"", suite, b"psk_id_hash", b"") + extract(b"", suite, b"info_hash", info)
    prk = extract(secret, suite, b"secret", b"")
    return expand(prk, suite, b"key", context, AEADS[aead][1]), expand(prk, suite, b"base_nonce", context, 12)


def encrypt(sender: X25519PrivateKey, recipient: X25519PublicKey, aead: int, info: bytes, text: bytes) -> bytes:
    enc = sender.public_key().public_bytes_raw()
    secret = shared_secret(sender.exchange(recipient), enc, recipient.public_bytes_raw())
    key, nonce = key_and_nonce(secret, aead, info)
    return enc + AEADS[aead][0](key).encrypt(nonce, text, b"")


def decrypt(recipient: X25519PrivateKey, aead: int, info: bytes, sealed: bytes) -> bytes:
    enc = sealed[:32]
    dh = recipient.exchange(X25519PublicKey.from_public_bytes(enc))
    key, nonce = key_and_nonce(shared_secret(dh, enc, recipient.public_key().public_bytes_raw()), aead, info)
    return AEADS[aead][0](key).decrypt(nonce, sealed[32:], b"")


def raw(vector: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(vector[name])


def private(data: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(data)


# --- the RFC's values ---------------------------------------------------------------------------------------


@NAMED
def test_the_tests_own_hpke_gives_the_values_of_rfc_9180(vector: dict[str, Any]) -> None:
    sender, recipient = private(raw(vector, "skEm")), private(raw(vector, "skRm"))
    assert sender.public_key().public_bytes_raw() == raw(vector, "enc")
    assert recipient.public_key().public_bytes_raw() == raw(vector, "pkRm")
    secret = shared_secret(sender.exchange(recipient.public_key()), raw(vector, "enc"), raw(vector, "pkRm"))
    assert secret == raw(vector, "shared_secret")
    key, nonce = key_and_nonce(secret, vector["aead_id"], raw(vector, "info"))
    assert (key, nonce) == (raw(vector, "key"), raw(vector, "base_nonce"))
    cipher = AEADS[vector["aead_id"]][0](key)
    assert cipher.encrypt(nonce, raw(vector, "pt"), raw(vector, "aad")) == raw(vector, "ct")


@NAMED
def test_our_suites_decrypt_the_ciphertexts_of_rfc_9180(vector: dict[str, Any]) -> None:
    """With the function that cryptography has for its own tests: associated data is no part of its interface."""
    from cryptography.hazmat.bindings._rust import openssl

    with_aad = getattr(openssl.hpke, "_decrypt_with_aad", None)
    if with_aad is None:
        pytest.skip("this cryptography keeps associated data to itself")
    suite = SUITES[0x10 + vector["aead_id"]]
    recipient, sealed = private(raw(vector, "skRm")), raw(vector, "enc") + raw(vector, "ct")
    assert with_aad(suite, sealed, recipient, raw(vector, "info"), raw(vector, "aad")) == raw(vector, "pt")


@pytest.mark.parametrize("form", SUITES)
@pytest.mark.parametrize("size", [1, 19, 35, 67])
def test_our_hpke_and_the_tests_own_decrypt_each_other(form: int, size: int) -> None:
    recipient, clear = X25519PrivateKey.generate(), os.urandom(size)
    ours = seal(form, clear, recipient.public_key())
    assert ours[0] == form
    assert decrypt(recipient, form - 0x10, INFO, ours[1:]) == clear
    theirs = encrypt(X25519PrivateKey.generate(), recipient.public_key(), form - 0x10, INFO, clear)
    assert len(theirs) + 1 == len(ours)
    assert unseal(bytes((form,)) + theirs, recipient) == clear


def test_bytes_sealed_in_another_context_are_refused() -> None:
    recipient = X25519PrivateKey.generate()
    for info in (b"", INFO + b"x"):
        theirs = b"\x12" + encrypt(X25519PrivateKey.generate(), recipient.public_key(), 2, info, b"clear")
        with pytest.raises(PeerError):
            unseal(theirs, recipient)


# --- the curve: RFC 7748 ------------------------------------------------------------------------------------

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICES = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOBS = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")


@pytest.mark.parametrize(
    ("scalar", "u", "product"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
        (ALICE.hex(), BOBS.hex(), "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"),
        (BOB.hex(), ALICES.hex(), "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"),
    ],
)
def test_a_multiplication_gives_the_product_of_rfc_7748(scalar: str, u: str, product: str) -> None:
    """RFC 7748, 5.2 and 6.1."""
    point = X25519PublicKey.from_public_bytes(bytes.fromhex(u))
    assert private(bytes.fromhex(scalar)).exchange(point).hex() == product


def test_a_thousand_multiplications_give_the_value_of_rfc_7748() -> None:
    """RFC 7748, 5.2."""
    k = u = b"\x09" + bytes(31)
    for count in range(1000):
        k, u = private(k).exchange(X25519PublicKey.from_public_bytes(u)), k
        if count == 0:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@pytest.mark.parametrize(("secret", "public"), [(ALICE, ALICES), (BOB, BOBS)])
def test_a_key_of_rfc_7748_in_a_file_has_its_signature_and_unwraps(
    tmp_path: Path, secret: bytes, public: bytes
) -> None:
    path = tmp_path / "rfc.pem"
    path.touch(0o600)
    path.write_bytes(private(secret).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signature = hashlib.sha256(b"upcall x25519 1: signature\0" + public).hexdigest()[:16]
    handle = module.open(signature, pack_blob(Blob(str(path), "none", 0x13)), GivenSecrets())
    exported = load_pem_public_key(handle.export_public())
    assert isinstance(exported, X25519PublicKey)
    assert exported.public_bytes_raw() == public
    assert signature_of(exported) == signature
    sealed = encrypt(private(BOB), X25519PublicKey.from_public_bytes(public), 1, INFO, b"a file's key")
    assert handle.unwrap(b"\x11" + sealed) == b"a file's key"


@pytest.mark.parametrize(
    "point",
    [
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ],
)
def test_points_of_small_order_are_refused(point: str) -> None:
    """With them the shared secret is known to be 0. RFC 9180, 7.1.4 and RFC 7748, 6.1 require a refusal."""
    recipient, enc = X25519PrivateKey.generate(), bytes.fromhex(point)
    key, nonce = key_and_nonce(shared_secret(bytes(32), enc, recipient.public_key().public_bytes_raw()), 2, INFO)
    forged = b"\x12" + enc + AESGCM(key).encrypt(nonce, b"forged", b"")
    with pytest.raises(PeerError):
        unseal(forged, recipient)
