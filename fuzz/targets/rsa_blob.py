"""Fuzzes blobs of the openssl key module, in auth tokens, from any process of the user.

Raises only PeerError. A blob packs to the same bytes, except for forms that only ecryptfs-utils writes.
"""

from __future__ import annotations

from upcall_rsa.blob import Blob, pack_blob, take_blob

from fuzz.target import same, taken

SEEDS = [
    pack_blob(Blob("/home/ada/key.pem", source, passphrase))
    for source, passphrase in (("ask", b""), ("keyring", b""), ("none", b""), ("file:/x", b""), (None, b"secret"))
]


def run(data: bytes) -> None:
    blob = taken(take_blob, data)
    if blob is not None:
        same(take_blob(pack_blob(blob)), blob)
