"""Packs keys into one encrypted file, and takes such a file apart. No I/O; docs/backup.md has the bytes.

    16  "upcall-backup 1" and a newline
     4  Argon2id: memory in KiB      1  passes      1  lanes      16  salt
    12  nonce
     8  size of the rest of the file
        ChaCha20-Poly1305 of the content, and its tag of 16; the 58 bytes before are the associated data

Numbers are big-endian. The content is JSON: see `_content_of`. Everything in it is checked before anything of it is
used: a backup may come from anywhere, with a passphrase that came with it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.keys.passphrase import MAX_SIZE as MAX_PASSPHRASE
from upcall.keys.private_file import wipe
from upcall.keys.store import MAX_FILE, SUFFIX, Entry, check_name, parse, text_of

MAGIC: Final = b"upcall-backup 1\n"
MAX_KEY_FILE: Final = 64 * 1024  # bytes
MAX_KEYS: Final = 1000
MAX_CONTENT: Final = 16 * 1024 * 1024  # bytes

_HEADER = struct.Struct("!16sIBB16s12sQ")
MAX_BACKUP: Final = _HEADER.size + MAX_CONTENT + 16  # bytes of the whole file
_SALT, _NONCE, _TAG, _KEY = 16, 12, 16, 32
_KEY_SUFFIX = re.compile(r"(\.[A-Za-z0-9]{1,16})?")
_FIELDS: Final = {"name", "entry", "file", "suffix", "passphrase"}


class Cost(NamedTuple):
    """The cost of each guess at the passphrase: Argon2id's memory in KiB, passes and lanes."""

    memory: int
    passes: int
    lanes: int


COST: Final = Cost(256 * 1024, 3, 4)  # RFC 9106, 4, between its two options
_LEAST, _MOST = Cost(8 * 1024, 1, 1), Cost(1024 * 1024, 16, 16)
_MOST_WORK: Final = 4 * 1024 * 1024  # KiB times passes: some seconds


class Kept(NamedTuple):
    """A key in a backup."""

    name: str
    entry: Entry
    file: bytes | None  # the key file; None for a key without one
    suffix: str  # of the key file's name: ".pem"
    passphrase: bytes | None  # that the keyring library kept; None if it is kept elsewhere, or nowhere

    def __repr__(self) -> str:
        return f"Kept({self.name!r}, {self.entry.signature})"


def pack_backup(keys: Sequence[Kept], passphrase: bytearray, cost: Cost = COST) -> bytes:
    """Returns a backup of these keys. UsageError if they are too many, or too large."""
    content = _content_of(keys)
    try:
        if len(content) > MAX_CONTENT:
            raise UsageError(f"a backup of {len(content)} bytes: {MAX_CONTENT} are possible, make more than one")
        salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
        header = _HEADER.pack(MAGIC, *cost, salt, nonce, len(content) + _TAG)
        sealed: bytes = _cipher(passphrase, salt, cost).encrypt(nonce, bytes(content), header)
        return header + sealed
    finally:
        wipe(content)


def take_backup(data: bytes, passphrase: bytearray, where: str) -> list[Kept]:
    """Decrypts a backup and returns its keys. `where`: the file, for the PeerError that is raised if it is malformed,
    or the passphrase is wrong. MemoryError if there is not enough to derive the key."""
    from cryptography.exceptions import InvalidTag

    cost, salt, nonce = take_header(data, where)
    header, sealed = data[: _HEADER.size], data[_HEADER.size :]
    try:
        content = _cipher(passphrase, salt, cost).decrypt(nonce, sealed, header)
    except InvalidTag:
        raise PeerError(where, "the passphrase is wrong, or the file was changed") from None
    return take_content(content, where)


def take_header(data: bytes, where: str) -> tuple[Cost, bytes, bytes]:
    """Parses the header, and checks the size of the whole. Returns cost, salt and nonce. PeerError."""
    if not data.startswith(MAGIC):
        raise PeerError(where, "is no backup of upcall's, or of a newer version")
    if len(data) < _HEADER.size:
        raise PeerError(where, f"ends after {len(data)} bytes, within its header")
    _, memory, passes, lanes, salt, nonce, size = _HEADER.unpack_from(data)
    cost = Cost(memory, passes, lanes)
    within = all(least <= value <= most for least, value, most in zip(_LEAST, cost, _MOST, strict=True))
    if not within or memory * passes > _MOST_WORK:
        raise PeerError(where, f"wants {memory} KiB of memory, {passes} passes and {lanes} lanes for its passphrase")
    there = len(data) - _HEADER.size
    if not _TAG <= size <= MAX_CONTENT + _TAG or size != there:
        raise PeerError(where, f"has {there} bytes after its header, which says {size}: it was cut off, or damaged")
    return cost, salt, nonce


def _cipher(passphrase: bytearray, salt: bytes, cost: Cost) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(
        salt=salt, length=_KEY, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory, ad=b"upcall backup"
    )
    key = bytearray(_KEY)
    try:
        kdf.derive_into(passphrase, key)  # type: ignore[arg-type] # it accepts any buffer
        return ChaCha20Poly1305(bytes(key))
    finally:
        wipe(key)


def key_suffix(path: str | None) -> str:
    """Returns the suffix of a key file's name, for `Kept`; "" without one, or if it is unusual."""
    suffix = "" if path is None else Path(path).suffix
    return suffix if _is_suffix(suffix) else ""


def _is_suffix(suffix: str) -> bool:
    return bool(_KEY_SUFFIX.fullmatch(suffix)) and suffix != SUFFIX


# --- the content -----------------------------------------------------------------------------------------------


def _content_of(keys: Sequence[Kept]) -> bytearray:
    """Packs keys: {"keys": [{"name", "entry", and if there are: "file", "suffix", "passphrase"}]}. `entry` is the text
    of the entry's file; `file` and `passphrase` are in base64. The same keys give the same bytes."""
    if not 1 <= len(keys) <= MAX_KEYS:
        raise UsageError(f"{len(keys)} keys: a backup has 1 to {MAX_KEYS}")
    found = []
    for key in keys:
        fields = {"name": key.name, "entry": text_of(key.entry).decode()}
        if key.file is not None:
            fields |= {"file": base64.b64encode(key.file).decode("ascii"), "suffix": key.suffix}
        if key.passphrase is not None:
            fields["passphrase"] = base64.b64encode(key.passphrase).decode("ascii")
        found.append(fields)
    return bytearray(json.dumps({"keys": found}, sort_keys=True, separators=(",", ":")).encode())


def take_content(content: bytes, where: str) -> list[Kept]:
    """Parses the decrypted content. PeerError if anything in it is malformed, or there twice."""
    try:
        told = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError):  # also UnicodeDecodeError
        raise PeerError(where, "its content is no JSON, or names a field twice") from None
    listed = told.get("keys") if isinstance(told, dict) and told.keys() == {"keys"} else None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_KEYS:
        raise PeerError(where, f"its content is no list of 1 to {MAX_KEYS} keys")
    keys = [_take_key(fields, f"{where}, key {number}") for number, fields in enumerate(listed, 1)]
    names = [key.name for key in keys]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PeerError(where, f"has two keys of the name {twice}")
    return keys


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _take_key(fields: Any, where: str) -> Kept:
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise PeerError(where, "is no table of texts")
    if not {"name", "entry"} <= fields.keys() <= _FIELDS or ("file" in fields) != ("suffix" in fields):
        raise PeerError(where, "its fields are not those of a key")
    name, text = fields["name"], fields["entry"].encode(errors="surrogatepass")
    try:
        check_name(name)
    except UpcallError as error:
        raise PeerError(where, str(error)) from None
    if len(text) > MAX_FILE:
        raise PeerError(where, f"an entry of {len(text)} bytes, at most {MAX_FILE} are allowed")
    entry = parse(name, text, where)
    file = _take_bytes(fields, "file", MAX_KEY_FILE, where)
    if (entry.path is None) is not (file is None):
        raise PeerError(where, "its entry names a key file that is not there, or none, and one is there")
    suffix = fields.get("suffix", "")
    if not _is_suffix(suffix):
        raise PeerError(where, f"a key file cannot end in {suffix!r}")
    return Kept(name, entry, file, suffix, _take_bytes(fields, "passphrase", MAX_PASSPHRASE, where))


def _take_bytes(fields: dict[str, str], field: str, most: int, where: str) -> bytes | None:
    if field not in fields:
        return None
    try:
        data = base64.b64decode(fields[field], validate=True)
    except (binascii.Error, ValueError):
        raise PeerError(where, f"its {field} is not base64") from None
    if not 1 <= len(data) <= most:
        raise PeerError(where, f"a {field} of {len(data)} bytes, 1 to {most} are allowed")
    return data
