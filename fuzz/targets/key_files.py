"""Fuzzes unencrypted PEM files of the openssl and x25519 modules: the user's files.

Raises only ModuleFailed. A signature is 16 hexadecimal digits. (Encrypted files specify the cost of their key
derivation, which OpenSSL does not limit; only the user can write them.)
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import upcall_rsa
import upcall_x25519
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fuzz.target import holds, taken
from upcall.core.errors import ModuleFailed
from upcall.keys.pem import load_pem
from upcall.protocols.ecryptfs.packets import is_signature

_VECTORS = json.loads((Path(__file__).parents[2] / "tests/vectors/keys.json").read_text())
_CAPTURED = load_pem_private_key(_VECTORS["keys"]["captured"]["pem"].encode(), b"labpass")
_X25519 = X25519PrivateKey.from_private_bytes(bytes(range(32)))
SEEDS = [
    _CAPTURED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    _CAPTURED.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
    _X25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
]
MOST = 4096
MEMORY = 4 << 20


def run(data: bytes) -> None:
    pem = bytearray(data)
    if b"ENCRYPTED" in pem:
        return
    for trusted in (True, False):
        key = taken(partial(load_pem, pem, bytearray(), "/k", trusted=trusted), refuse=(ModuleFailed,))
        if isinstance(key, RSAPrivateKey):
            holds(is_signature(upcall_rsa.signature_of(key.public_key())), "no signature")
        if isinstance(key, X25519PrivateKey):
            holds(is_signature(upcall_x25519.signature_of(key.public_key())), "no signature")
