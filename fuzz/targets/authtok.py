"""Fuzzes auth tokens in keyrings, from any process of the user.

Raises only PeerError. A token packs to one that parses to the same values. Its blob is within its limit.
"""

from __future__ import annotations

from fuzz.target import holds, same, taken
from upcall.keymodule import MAX_BLOB
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok, take_auth_tok

SEEDS = [pack_auth_tok(AuthTok("80f0e50e8a936f95", "openssl", blob)) for blob in (b"", b"blob" * 20)]


def run(data: bytes) -> None:
    token = taken(take_auth_tok, data)
    if token is not None:
        holds(len(token.blob) <= MAX_BLOB, "a blob above its limit")
        same(take_auth_tok(pack_auth_tok(token)), token)
