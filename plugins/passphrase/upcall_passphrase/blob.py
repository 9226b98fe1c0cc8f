"""Packs and parses the blob of the passphrase key module: the parameters of the derivation, without secrets. Pure.

    u8 version 1, u16 memory in MiB, u8 passes, 16 bytes salt, 16 bytes check, u16 len, source

Numbers are in network byte order. The signature is computed from everything before the source. The version identifies
Argon2id with 4 lanes, and the whole scheme of `upcall_passphrase.derived`.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256, Hash

from upcall.core.errors import PeerError, UsageError
from upcall.keys.base import check_source
from upcall_passphrase.derived import CHECK, SALT, Cost, check_cost

WHAT: Final = "passphrase blob"
VERSION: Final = 1
MAX_SOURCE: Final = 1024  # bytes

_HEAD = struct.Struct(f"!BHB{SALT}s{CHECK}s")
_LENGTH = struct.Struct("!H")
_SIGNED = b"upcall passphrase 1: signature\0"


class Blob(NamedTuple):
    """A parsed blob: parameters of the derivation, check value, and source of the passphrase."""

    cost: Cost
    salt: bytes
    check: bytes
    source: str


def signature_of(blob: Blob) -> str:
    """Returns the signature, 16 hexadecimal digits: the first 8 bytes of SHA-256 over `_SIGNED` and the blob up to its
    source.

    It depends on the passphrase through the check value. Guessing the passphrase from it costs one Argon2id each.
    """
    digest = Hash(SHA256())
    digest.update(_SIGNED + _pack_head(blob))
    return digest.finalize()[:8].hex()


def pack_blob(blob: Blob) -> bytes:
    """Packs a blob. UsageError if a field is out of bounds."""
    check_source(blob.source, none=False)
    source = os.fsencode(blob.source)
    if len(source) > MAX_SOURCE:
        raise UsageError(f"the source of the passphrase has {len(source)} bytes, at most {MAX_SOURCE} are allowed")
    return _pack_head(blob) + _LENGTH.pack(len(source)) + source


def _pack_head(blob: Blob) -> bytes:
    check_cost(blob.cost)
    if (len(blob.salt), len(blob.check)) != (SALT, CHECK):
        raise UsageError(f"a salt has {SALT} bytes, a check value {CHECK}")
    return _HEAD.pack(VERSION, blob.cost.memory, blob.cost.passes, blob.salt, blob.check)


def take_blob(data: bytes) -> Blob:
    """Parses a blob that fills `data`. PeerError if it is malformed; it names the offset."""
    start = _HEAD.size + _LENGTH.size
    if len(data) < start:
        raise PeerError(WHAT, f"{len(data)} bytes, at least {start} are needed")
    version, memory, passes, salt, check = _HEAD.unpack_from(data)
    if version != VERSION:
        raise PeerError(WHAT, f"version {version}, {VERSION} is known", 0)
    (size,) = _LENGTH.unpack_from(data, _HEAD.size)
    if size > MAX_SOURCE or start + size != len(data):
        raise PeerError(WHAT, f"a source of {size} bytes, {len(data) - start} are there", _HEAD.size)
    blob = Blob(Cost(memory, passes), salt, check, os.fsdecode(data[start:]))
    try:
        check_cost(blob.cost)
    except UsageError as error:
        raise PeerError(WHAT, str(error), 1) from None
    try:
        check_source(blob.source, none=False)
    except UsageError as error:
        raise PeerError(WHAT, str(error), start) from None
    return blob
