"""Fuzzes blobs and sealed keys of the x25519 module, from auth tokens and headers of files.

Raises only PeerError. A blob packs to the same bytes. A changed sealed key cannot be unsealed.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from upcall_x25519.blob import Blob, pack_blob, take_blob
from upcall_x25519.sealed import AES_256_GCM, CHACHA20_POLY1305, unseal

from fuzz.target import same, taken

_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
SEEDS = [
    pack_blob(Blob("/home/ada/key.pem", "ask", AES_256_GCM)),
    pack_blob(Blob("/k", "file:/p", CHACHA20_POLY1305)),
    bytes((AES_256_GCM,)) + bytes(80),
    bytes((AES_256_GCM,)) + _KEY.public_key().public_bytes_raw() + bytes(40),
]


def run(data: bytes) -> None:
    blob = taken(take_blob, data)
    if blob is not None:
        same(pack_blob(blob), data)
    same(taken(unseal, data, _KEY), None)
