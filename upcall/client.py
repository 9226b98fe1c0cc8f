"""Sends requests to the caller's daemon through the broker, as the kernel does.

with Client() as client:
    wrapped = client.wrap(signature, key)
    assert client.unwrap(signature, wrapped) == key
"""

from __future__ import annotations

from upcall.core.errors import UsageError
from upcall.process.connection import BrokerConnection
from upcall.process.connection import NoBroker as NoBroker
from upcall.protocols.ecryptfs.packets import (
    CIPHER_OPAQUE,
    MAX_KEY,
    TAG_64,
    TAG_66,
    Ask,
    FileKey,
    is_signature,
    pack_ask,
    pack_file_key,
    take_file_key,
    take_reply,
)


class Client(BrokerConnection):
    """A requester. `uid`: the user whose daemon is asked, by default the caller; only root may ask another's.
    `folder`, `timeout`: see BrokerConnection. Not thread-safe: one per thread."""

    def wrap(self, signature: str, key: bytes) -> bytes:
        """Wraps `key` (1 to 64 bytes) with the key of this signature (16 hexadecimal digits). Returns the wrapped key.
        Blocks until the answer. UsageError on other sizes; other errors as BrokerConnection.ask."""
        if not 1 <= len(key) <= MAX_KEY:
            raise UsageError(f"a key of {len(key)} bytes, 1 to {MAX_KEY} can be wrapped")
        return self._packet(TAG_66, signature, pack_file_key(FileKey(CIPHER_OPAQUE, key)))

    def unwrap(self, signature: str, wrapped: bytes) -> bytes:
        """Unwraps what `wrap` returned; returns the key. Blocks until the answer. Refused("module-failed") if another
        key wrapped it; other errors as BrokerConnection.ask."""
        return take_file_key(self._packet(TAG_64, signature, wrapped)).key

    def _packet(self, tag: int, signature: str, content: bytes) -> bytes:
        if not is_signature(signature):
            raise UsageError(f"signature {signature!r} is not 16 hexadecimal digits")
        body = pack_ask(Ask(tag, signature, content))
        return take_reply(self.ask("key", body)).content
