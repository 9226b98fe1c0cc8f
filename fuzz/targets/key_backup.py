"""Fuzzes backups of keys: their header, and their content once it is decrypted: a passphrase may come with a backup.

Raises only PeerError. A content is packed as it was parsed, and its names are names of keys, its sizes within bounds.
"""

from __future__ import annotations

import datetime

from fuzz.target import holds, same, taken
from upcall.core.errors import UsageError
from upcall.keys.backup import (
    COST,
    MAGIC,
    MAX_KEY_FILE,
    MAX_KEYS,
    Kept,
    _content_of,
    pack_backup,
    take_content,
    take_header,
)
from upcall.keys.store import COMPAT, Entry, check_name

_WHEN = datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
_FILED = Entry("work", "openssl", "80f0e50e8a936f95", "ask", "RSA-3072", _WHEN, "/home/you/key.pem", b"blob")
_PLAIN = Entry("words", "passphrase", "00f0e50e8a936f95", "keyring", "Argon2id", _WHEN, None, b"b", {"memory": "64"})
_KEYS = [
    Kept("work", _FILED, b"-----BEGIN", ".pem", None),
    Kept("words", _PLAIN, None, "", b"a passphrase"),
    Kept("old", _FILED._replace(name="old", source=COMPAT, blob=None), b"\0" * 300, "", None),
]
SEEDS = [
    bytes(_content_of(_KEYS)),
    bytes(_content_of(_KEYS[1:2])),
    pack_backup(_KEYS, bytearray(b"passphrase"), COST._replace(memory=8 * 1024, passes=1)),
    MAGIC + b"\xff" * 100,
    b'{"keys":[' + b"[" * 3000,
    b'{"keys":[{"name":"../x","entry":"","entry":""}]}',
]
MEMORY = 4 << 20


def run(data: bytes) -> None:
    taken(take_header, data, "file")
    keys = taken(take_content, data, "file")
    if keys is None:
        return
    holds(1 <= len(keys) <= MAX_KEYS, "number of keys")
    same(len({key.name for key in keys}), len(keys))
    for key in keys:
        check_name(key.name)
        holds(len(key.file or b"") <= MAX_KEY_FILE, "size of a key file")
        holds("/" not in key.suffix and key.suffix != ".toml", "suffix")
    content = taken(_content_of, keys, refuse=(UsageError,))
    if content is not None:
        same(take_content(bytes(content), "file"), keys)
