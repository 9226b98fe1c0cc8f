"""Packs and parses the blob of a key in a token: its URI and wrapping scheme. Contains no secret. Pure.

u8 version 1, u8 scheme, u8 flags, u16 len (big endian), URI in its canonical form
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall_pkcs11.uri import Uri, parse_uri

WHAT = "pkcs11 blob"
VERSION = 1

_HEAD = struct.Struct(">BBBH")


class Scheme(enum.IntEnum):
    """The scheme by which a key wraps."""

    RSA_OAEP_SHA1 = 1
    RSA_OAEP_SHA256 = 2
    ECDH_HKDF_SHA256_AES256_GCM = 3


class Flags(enum.IntFlag):
    LOGIN_FIRST = 1  # the public half can be read only after a login
    TOUCH = 2  # the token requires a touch to use the private half


class Blob(NamedTuple):
    uri: Uri  # names a library, a token by its serial number, and an object by its label or id
    scheme: Scheme
    flags: Flags = Flags(0)


def pack_blob(blob: Blob) -> bytes:
    """Packs a blob. UsageError if a field is out of bounds."""
    uri = str(blob.uri).encode("ascii")
    packed = _HEAD.pack(VERSION, blob.scheme, blob.flags, len(uri)) + uri
    try:
        take_blob(packed)
    except PeerError as error:
        raise UsageError(str(error)) from None
    return packed


def take_blob(data: bytes) -> Blob:
    """Parses a blob that fills `data`. PeerError if it is malformed; it names the offset."""
    if len(data) < _HEAD.size:
        raise PeerError(WHAT, f"{len(data)} bytes, at least {_HEAD.size} are needed")
    version, scheme, flags, size = _HEAD.unpack_from(data)
    if version != VERSION:
        raise PeerError(WHAT, f"version {version}, this is {VERSION}", 0)
    if scheme not in Scheme.__members__.values():
        raise PeerError(WHAT, f"unknown scheme {scheme}", 1)
    if flags & ~int(Flags.LOGIN_FIRST | Flags.TOUCH):
        raise PeerError(WHAT, f"unknown flags {flags:#x}", 2)
    if len(data) != _HEAD.size + size:
        raise PeerError(WHAT, f"a URI of {size} bytes, {len(data) - _HEAD.size} are there", 3)
    return Blob(_take_uri(bytes(data[_HEAD.size :])), Scheme(scheme), Flags(flags))


def _take_uri(data: bytes) -> Uri:
    if not data.isascii():
        raise PeerError(WHAT, "the URI is not ASCII", _HEAD.size)
    text = data.decode("ascii")
    try:
        uri = parse_uri(text)
    except PeerError as error:
        where = None if error.where is None else _HEAD.size + error.where
        raise PeerError(WHAT, error.why, where) from None
    if str(uri) != text:
        raise PeerError(WHAT, "the URI is not in its canonical form", _HEAD.size)
    if uri.module_path is None or uri.serial is None or uri.token is None:
        raise PeerError(WHAT, "the URI names no module-path, token or serial", _HEAD.size)
    if uri.object is None and uri.id is None:
        raise PeerError(WHAT, "the URI names no object", _HEAD.size)
    return uri
