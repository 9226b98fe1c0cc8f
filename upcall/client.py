"""Sends requests to the caller's daemon through the broker, as the kernel does: docs/python.md.

with Client() as client:
    wrapped = client.wrap("default", key)
    assert client.unwrap("default", wrapped) == key
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from upcall.core.errors import Refused, UsageError, error_words
from upcall.process.connection import BrokerConnection, check_bytes
from upcall.process.connection import NoBroker as NoBroker
from upcall.process.connection import TimedOut as TimedOut
from upcall.protocols.ecryptfs.packets import (
    CIPHER_OPAQUE,
    MAX_KEY,
    MAX_WRAPPED,
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

SERVICE: Final = "key"


class Client(BrokerConnection):
    """A requester. `uid`: the user whose daemon is asked, by default the caller; only root may ask another's.
    `folder`, `timeout`, threads, errors: see BrokerConnection.

    Keys are named as on the command line: by the name in the caller's key store, or by signature."""

    def wrap(self, key: str, data: bytes | bytearray | memoryview) -> bytes:
        """Wraps `data` (1 to 64 bytes) with the key of this name or signature. Returns the wrapped data. Blocks until
        the answer. UsageError on other sizes, and if there is no key of this name; other errors as `ask`."""
        with naming(key):
            return take_reply(self.ask(SERVICE, wrapping(signature_of(key), data))).content

    def unwrap(self, key: str, wrapped: bytes | bytearray | memoryview) -> bytes:
        """Unwraps what `wrap` returned; returns the data. Blocks until the answer. Refused("module-failed") if another
        key wrapped it; other errors as `wrap`."""
        with naming(key):
            return take_file_key(take_reply(self.ask(SERVICE, unwrapping(signature_of(key), wrapped))).content).key


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """A context in which a Refused gets the name of the key, for its text."""
    try:
        yield
    except Refused as refused:
        refused.key = key
        raise


def wrapping(signature: str, data: object) -> bytes:
    """Returns the body of a request to wrap `data`. UsageError as Client.wrap."""
    content = pack_file_key(FileKey(CIPHER_OPAQUE, check_bytes(data, "what is to be wrapped", 1, MAX_KEY)))
    return pack_ask(Ask(TAG_66, signature, content))


def unwrapping(signature: str, wrapped: object) -> bytes:
    """Returns the body of a request to unwrap. UsageError as Client.unwrap."""
    return pack_ask(Ask(TAG_64, signature, check_bytes(wrapped, "what is to be unwrapped", 1, MAX_WRAPPED)))


def signature_of(key: object) -> str:
    """Returns the signature of a key that is named by its name or signature. Reads the key store, which may block,
    unless it is a signature. UsageError if there is no such key; PeerError if its entry is malformed."""
    if not isinstance(key, str):
        raise UsageError(f"a key of type {type(key).__name__}: its name or its signature, a text, is needed")
    if is_signature(key):
        return key
    from upcall.keys.store import KeyStore  # a signature needs no store

    try:
        return KeyStore().find(key).signature
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise UsageError(f"the key {key!r} cannot be looked up: {error_words(error)}") from error
