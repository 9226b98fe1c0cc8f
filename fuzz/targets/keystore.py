"""Fuzzes entries of the key store: files that any process of the user may write.

Raises only PeerError. An entry is written as it was parsed.
"""

from __future__ import annotations

import datetime

from fuzz.target import same, taken
from upcall.core.errors import UsageError
from upcall.keys.store import COMPAT, MAX_FILE, Entry, parse, text_of

_ENTRY = Entry(
    "default", "openssl", "80f0e50e8a936f95", "ask", "RSA-3072", datetime.datetime(2025, 1, 2, 3, 4, 5), "/k", b"blob"
)
SEEDS = [
    text_of(_ENTRY),
    text_of(_ENTRY._replace(source=COMPAT, blob=None, parameters={"bits": "3072"}, auto=True)),
    b"module = " + b"[" * 3000,
    b"module = " + b"9" * 5000,
]
MOST = MAX_FILE


def run(data: bytes) -> None:
    entry = taken(parse, "default", data, "/file")
    if entry is None:
        return
    text = taken(text_of, entry, refuse=(UsageError,))
    if text is not None:
        same(parse("default", text, "/file"), entry)
