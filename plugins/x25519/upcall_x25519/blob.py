"""Packs and parses the blob of the x25519 key module: key file, source of its passphrase, form of new wrapped keys.
Pure.

    u8 version 1, u8 form, u16 len, path, u16 len, source

Numbers are in network byte order. The form is that of `upcall_x25519.sealed`. There is no secret in it.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.keys.base import check_source
from upcall_x25519.sealed import SUITES

WHAT: Final = "x25519 blob"
VERSION: Final = 1
MAX_FIELD: Final = 1024  # bytes of a path or a source

_HEAD = struct.Struct("!BB")
_LENGTH = struct.Struct("!H")


class Blob(NamedTuple):
    """A parsed blob: key file, source of its passphrase, form of new wrapped keys."""

    path: str
    source: str
    form: int


def pack_blob(blob: Blob) -> bytes:
    """Packs a blob. UsageError if a field is out of bounds."""
    _check(blob)
    return (
        _HEAD.pack(VERSION, blob.form)
        + _pack_field(blob.path, "path of the key file")
        + _pack_field(blob.source, "source of the passphrase")
    )


def take_blob(data: bytes) -> Blob:
    """Parses a blob that fills `data`. PeerError if it is malformed; it names the offset."""
    if len(data) < _HEAD.size:
        raise PeerError(WHAT, f"{len(data)} bytes, at least {_HEAD.size} are needed")
    version, form = _HEAD.unpack_from(data)
    if version != VERSION:
        raise PeerError(WHAT, f"version {version}, {VERSION} is known", 0)
    path, at = _take_field(data, _HEAD.size, "path")
    source, end = _take_field(data, at, "source")
    if end != len(data):
        raise PeerError(WHAT, f"{len(data) - end} bytes too many", end)
    blob = Blob(path, source, form)
    try:
        _check(blob)
    except UsageError as error:
        raise PeerError(WHAT, str(error)) from None
    return blob


def _check(blob: Blob) -> None:
    if blob.form not in SUITES:
        raise UsageError(f"unknown form {blob.form:#04x}")
    if not blob.path.startswith("/") or "\0" in blob.path:
        raise UsageError(f"the path of a key file must be absolute, {blob.path!r} is not")
    check_source(blob.source)


def _pack_field(text: str, what: str) -> bytes:
    field = os.fsencode(text)
    if len(field) > MAX_FIELD:
        raise UsageError(f"the {what} has {len(field)} bytes, at most {MAX_FIELD} are allowed")
    return _LENGTH.pack(len(field)) + field


def _take_field(data: bytes, at: int, what: str) -> tuple[str, int]:
    start = at + _LENGTH.size
    if start > len(data):
        raise PeerError(WHAT, f"ends before the {what}", at)
    (size,) = _LENGTH.unpack_from(data, at)
    end = start + size
    if size > MAX_FIELD or end > len(data):
        raise PeerError(WHAT, f"a {what} of {size} bytes, {len(data) - start} are there", at)
    return os.fsdecode(data[start:end]), end
