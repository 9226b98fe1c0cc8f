"""Packs and parses the blob of the openssl key module: key file, and passphrase or its source. Pure.

    u16 len, path NUL, u16 len, passphrase NUL [, u16 len, source NUL]

Source: src/key_mod/ecryptfs_key_mod_openssl.c of ecryptfs-utils 111. Lengths are in native byte order and
include the NUL. The third field is an extension: ecryptfs-utils does not read it. With it, the passphrase is empty.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.keys.base import NONE, check_source

WHAT = "openssl blob"
MAX_PATH = 1024
MAX_PASSPHRASE = 1024
MAX_SOURCE = 1024

_LENGTH = struct.Struct("=H")


class Blob(NamedTuple):
    """A parsed blob. `source`: of the passphrase; None: the blob contains the passphrase, as with ecryptfs-utils."""

    path: str
    source: str | None
    passphrase: bytes = b""

    def __repr__(self) -> str:
        return f"Blob(path={self.path!r}, source={self.source!r}, passphrase=<{len(self.passphrase)} bytes>)"


def pack_blob(blob: Blob) -> bytes:
    """Packs a blob. UsageError if a field is out of bounds."""
    path = os.fsencode(blob.path)
    if not path.startswith(b"/"):
        raise UsageError(f"the path of a key file must be absolute, {blob.path!r} is not")
    fields = [_pack_field(path, "path", MAX_PATH)]
    if blob.source is None:
        if not blob.passphrase:
            raise UsageError("without a source the blob needs the passphrase")
        fields.append(_pack_field(bytes(blob.passphrase), "passphrase", MAX_PASSPHRASE))
    else:
        check_source(blob.source)
        fields.append(_pack_field(b"", "passphrase", 0))
        fields.append(_pack_field(os.fsencode(blob.source), "source", MAX_SOURCE))
    return b"".join(fields)


def take_blob(data: bytes) -> Blob:
    """Parses a blob that fills `data`. PeerError if it is malformed; it names field and offset."""
    path, at = _take_field(data, 0, "path", MAX_PATH)
    if not path.startswith(b"/"):
        raise PeerError(WHAT, "the path is not absolute", 2)
    passphrase, at = _take_field(data, at, "passphrase", MAX_PASSPHRASE)
    if at == len(data):
        # ecryptfs-utils leaves the passphrase empty if the key file is not encrypted
        return Blob(os.fsdecode(path), None if passphrase else NONE, passphrase)
    start = at
    source, at = _take_field(data, at, "source", MAX_SOURCE)
    if at != len(data):
        raise PeerError(WHAT, f"{len(data) - at} bytes too many", at)
    if passphrase:
        raise PeerError(WHAT, "holds a passphrase and also says where it is kept", start)
    text = os.fsdecode(source)
    try:
        check_source(text)
    except UsageError as error:
        raise PeerError(WHAT, str(error), start + 2) from None
    return Blob(os.fsdecode(path), text)


def _pack_field(field: bytes, what: str, limit: int) -> bytes:
    if len(field) > limit:
        raise UsageError(f"the {what} has {len(field)} bytes, at most {limit} are allowed")
    if b"\0" in field:
        raise UsageError(f"the {what} holds a NUL")
    return _LENGTH.pack(len(field) + 1) + field + b"\0"


def _take_field(data: bytes, at: int, what: str, limit: int) -> tuple[bytes, int]:
    start = at + _LENGTH.size
    if start > len(data):
        raise PeerError(WHAT, f"ends before the {what}", at)
    (size,) = _LENGTH.unpack_from(data, at)
    if not 1 <= size <= limit + 1:
        raise PeerError(WHAT, f"a {what} of {size} bytes, 1 to {limit + 1} are allowed", at)
    end = start + size
    if end > len(data):
        raise PeerError(WHAT, f"a {what} of {size} bytes, {len(data) - start} are there", at)
    field = bytes(data[start : end - 1])
    if data[end - 1] or b"\0" in field:
        raise PeerError(WHAT, f"the {what} does not end in its only NUL", start)
    return field, end
