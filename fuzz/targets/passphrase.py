"""Fuzzes blobs of the passphrase module, in auth tokens: they specify the cost of the key derivation.

Raises only PeerError. A blob packs to the same bytes. No cost exceeds the limit.
"""

from __future__ import annotations

from upcall_passphrase.blob import Blob, pack_blob, signature_of, take_blob
from upcall_passphrase.derived import CHECK, SALT, Cost, check_cost

from fuzz.target import same, taken

SEEDS = [
    pack_blob(Blob(Cost(64, 3), bytes(SALT), bytes(CHECK), source))
    for source in ("ask", "keyring", "file:/home/ada/p")
]


def run(data: bytes) -> None:
    blob = taken(take_blob, data)
    if blob is not None:
        check_cost(blob.cost)
        signature_of(blob)
        same(pack_blob(blob), data)
