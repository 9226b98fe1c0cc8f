"""Packs and parses the blob of a sealed key: key file, TPM, and the name of the storage key. Pure.

    u8 version, u16 len, path, u16 len, TCTI, u16 34, name of the storage key         (big-endian)

The storage key's name authenticates the TPM: an attacker on the TPM's bus cannot substitute another storage key.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError

WHAT = "tpm2 blob"
VERSION = 1
NAME = 34  # bytes of a name with SHA-256
MAX_PATH, MAX_TCTI = 1024, 255

# Only these TCTIs, because any process of the user can write auth tokens, and a backup may come from another user:
# "cmd" would run a command, a path would load a library, commands would be written into any other file, and a TPM on
# another machine would learn PINs.
_TCTI = re.compile(
    r"device:/dev/tpm(?:rm)?[0-9]{1,3}|tabrmd(?::[A-Za-z0-9.,=:_-]*)?"
    r"|(?:swtpm|mssim):(?:(?:host=(?:localhost|127\.0\.0\.1|::1)|port=[0-9]{1,5}|path=/[A-Za-z0-9._/-]+)(?:,(?!$)|$))*"
)


class Blob(NamedTuple):
    path: str
    tcti: str
    parent: bytes  # the storage key's name


def check_tcti(tcti: str) -> None:
    """UsageError unless the TCTI only connects to a TPM."""
    if len(tcti) > MAX_TCTI or _TCTI.fullmatch(tcti) is None:
        raise UsageError(
            f"a TPM is at device:/dev/tpmrm0, tabrmd:, swtpm:host=127.0.0.1,port=N or mssim:..., not at {tcti!r}"
        )


def pack_blob(blob: Blob) -> bytes:
    """Packs a blob. UsageError if a field is out of bounds."""
    path = os.fsencode(blob.path)
    if not path.startswith(b"/") or len(path) > MAX_PATH:
        raise UsageError(f"the path of a key file must be absolute, and of at most {MAX_PATH} bytes: {blob.path!r}")
    check_tcti(blob.tcti)
    if len(blob.parent) != NAME:
        raise UsageError(f"a storage key's name has {NAME} bytes, not {len(blob.parent)}")
    fields = (path, blob.tcti.encode("utf-8"), blob.parent)
    return bytes((VERSION,)) + b"".join(len(field).to_bytes(2, "big") + field for field in fields)


def take_blob(data: bytes) -> Blob:
    """Parses a blob that fills `data`. PeerError if it is malformed; it names field and offset."""
    if data[:1] != bytes((VERSION,)):
        raise PeerError(WHAT, f"is not of version {VERSION}", 0)
    path, at = _take_field(data, 1, "path", MAX_PATH)
    tcti, at = _take_field(data, at, "TCTI", MAX_TCTI)
    name, at = _take_field(data, at, "name", NAME)
    if at != len(data):
        raise PeerError(WHAT, f"{len(data) - at} bytes too many", at)
    if not path.startswith(b"/") or b"\0" in path or len(name) != NAME:
        raise PeerError(WHAT, "no absolute path, or no name of a storage key")
    try:
        blob = Blob(os.fsdecode(path), tcti.decode("utf-8"), name)
        check_tcti(blob.tcti)
    except (UnicodeDecodeError, UsageError) as error:
        raise PeerError(WHAT, f"no TCTI: {error}") from None
    return blob


def _take_field(data: bytes, at: int, what: str, limit: int) -> tuple[bytes, int]:
    start = at + 2
    size = int.from_bytes(data[at:start], "big")
    if start > len(data) or not 1 <= size <= limit or start + size > len(data):
        raise PeerError(WHAT, f"no {what} of 1 to {limit} bytes", at)
    return data[start : start + size], start + size
