"""Makes requests for the clients, with the expected answers."""

from __future__ import annotations

import os

from bench.noop import Handle
from upcall.protocols.ecryptfs.packets import (
    AES_SIZES,
    CIPHER_AES_256,
    STATUS_OK,
    TAG_64,
    TAG_65,
    TAG_66,
    TAG_67,
    Ask,
    FileKey,
    Reply,
    pack_ask,
    pack_file_key,
    pack_reply,
)

NOOP_MODULES = {"noop": "bench.noop:module"}


def new_signature() -> str:
    """Returns a random signature, which no key has."""
    return os.urandom(8).hex()


def noop_wrap(signature: str) -> tuple[bytes, bytes]:
    """Returns a tag 66 packet with an AES-256 key, and the no-op module's answer, a tag 67 packet."""
    clear = new_file_key()
    return wrap(signature, clear, Handle().wrap(clear))


def wrap(signature: str, clear: bytes, wrapped: bytes) -> tuple[bytes, bytes]:
    """Returns a tag 66 packet, and a tag 67 packet that answers it."""
    return pack_ask(Ask(TAG_66, signature, clear)), pack_reply(Reply(TAG_67, STATUS_OK, wrapped))


def unwrap(signature: str, clear: bytes, wrapped: bytes) -> tuple[bytes, bytes]:
    """Returns a tag 64 packet, and the tag 65 packet that answers it."""
    return pack_ask(Ask(TAG_64, signature, wrapped)), pack_reply(Reply(TAG_65, STATUS_OK, clear))


def new_file_key(cipher: int = CIPHER_AES_256) -> bytes:
    return pack_file_key(FileKey(cipher, os.urandom(AES_SIZES[cipher])))
