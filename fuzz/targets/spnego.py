"""Fuzzes SPNEGO's NegTokenInit in DER.

Raises only PeerError. A token with one mechanism packs to the same bytes.
"""

from __future__ import annotations

from upcall_spnego.negtoken import KRB5, MS_KRB5, pack_negtokeninit, pack_oid, take_negtokeninit, take_oid

from fuzz.target import same, taken

SEEDS = [
    pack_negtokeninit(KRB5, b"token" * 40),
    pack_negtokeninit(MS_KRB5, b""),
    pack_oid("1.3.6.1.5.5.2")[2:],
    b"\x2b" + b"\xff" * 3000 + b"\x7f",
]


def run(data: bytes) -> None:
    found = taken(take_negtokeninit, data)
    if found is not None and len(found[0]) == 1:
        same(pack_negtokeninit(found[0][0], found[1]), data)
        pack_oid.cache_clear()  # the cache is for upcall's two identifiers only
    taken(take_oid, data)
