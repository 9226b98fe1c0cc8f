"""Packs and parses `struct ecryptfs_auth_tok` of a private key, the payload of a key in the user keyring. Pure.

Source: include/linux/ecryptfs.h of Linux 6.1 and key modules' use of it in ecryptfs-utils 111. The struct is
740 bytes. The key module's data ("blob") begins at 670, inside the struct's tail, and may extend beyond it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from upcall.core.errors import PeerError
from upcall.keymodule import MAX_BLOB

VERSION = 0x0004  # ECRYPTFS_VERSION_MAJOR 0, MINOR 4
PRIVATE_KEY = 1  # enum ecryptfs_token_types: ECRYPTFS_PRIVATE_KEY
STRUCT_SIZE = 740

_VERSION_AND_TYPE = struct.Struct("=HH")
_SIZES = struct.Struct("=II17s17s")  # key_size, data_len, signature, key_mod_alias
_SIZES_AT = 628
BLOB_AT = 670
SIGNATURE_LENGTH = 16  # ECRYPTFS_SIG_SIZE_HEX
KEY_SIZE = 16  # what mount.ecryptfs writes


class AuthTok(NamedTuple):
    """An auth token. `signature`: of the key, 16 characters. `alias`: of the key module, 1 to 16 characters. `blob`:
    the module's data, at most MAX_BLOB bytes; may hold a passphrase."""

    signature: str
    alias: str
    blob: bytes

    def __repr__(self) -> str:
        return f"AuthTok(signature={self.signature!r}, alias={self.alias!r}, blob=<{len(self.blob)} bytes>)"


def pack_auth_tok(token: AuthTok) -> bytes:
    """Returns 740 bytes plus the size of the blob, zero-padded as by mount.ecryptfs. PeerError if a field does not
    fit."""
    signature, alias = token.signature.encode("ascii"), token.alias.encode("ascii")
    if len(signature) != SIGNATURE_LENGTH or not 1 <= len(alias) <= 16 or b"\0" in signature + alias:
        raise PeerError("auth token", "a signature has 16 characters, a module's alias 1 to 16")
    if len(token.blob) > MAX_BLOB:
        raise PeerError("auth token", f"a blob of {len(token.blob)} bytes, at most {MAX_BLOB} are allowed")
    out = bytearray(STRUCT_SIZE + len(token.blob))
    _VERSION_AND_TYPE.pack_into(out, 0, VERSION, PRIVATE_KEY)
    _SIZES.pack_into(out, _SIZES_AT, KEY_SIZE, len(token.blob), signature, alias)
    out[BLOB_AT : BLOB_AT + len(token.blob)] = token.blob
    return bytes(out)


def take_auth_tok(data: bytes) -> AuthTok:
    """Parses a key's payload. PeerError if it is malformed, or a passphrase token."""
    if len(data) < STRUCT_SIZE:
        raise PeerError("auth token", f"{len(data)} bytes, at least {STRUCT_SIZE} are needed")
    version, kind = _VERSION_AND_TYPE.unpack_from(data, 0)
    if version != VERSION:
        raise PeerError("auth token", f"version {version:#06x}, {VERSION:#06x} is known", 0)
    if kind != PRIVATE_KEY:
        raise PeerError("auth token", f"token type {kind} is not a private key", 2)
    _, size, signature, alias = _SIZES.unpack_from(data, _SIZES_AT)
    if size > MAX_BLOB or BLOB_AT + size > len(data):
        raise PeerError("auth token", f"data_len {size}, {len(data) - BLOB_AT} bytes are there", _SIZES_AT + 4)
    name = _text(signature, "signature", _SIZES_AT + 8)
    if len(name) != SIGNATURE_LENGTH:
        raise PeerError("auth token", f"a signature of {len(name)} characters", _SIZES_AT + 8)
    return AuthTok(
        name,
        _text(alias, "alias", _SIZES_AT + 25),
        bytes(data[BLOB_AT : BLOB_AT + size]),
    )


def _text(field: bytes, what: str, where: int) -> str:
    text, nul, _ = field.partition(b"\0")
    if not text or not nul or not text.isascii() or not text.decode("ascii").isprintable():
        raise PeerError("auth token", f"the {what} is not text that ends in NUL", where)
    return text.decode("ascii")
