"""Decrypts the data of lower files, and unwraps file keys that a passphrase wrapped, as the kernel does. AES only.

Sources: fs/ecryptfs/crypto.c (ecryptfs_derive_iv, crypt_extent) and keystore.c
(decrypt_passphrase_encrypted_session_key) of Linux 6.1; generate_payload of ecryptfs-utils 111.

Each extent of 4096 bytes is encrypted by AES-CBC with an IV of its own: MD5 of MD5 of the file's key and the extent's
number as decimal text, in 16 bytes. There is no authentication: changed data decrypts to garbage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs.header import CIPHER_NAMES, PassphrasePacket
from upcall.protocols.ecryptfs.packets import AES_SIZES, FileKey

_CHUNK = 64  # extents that are read at once
EXTENT = 4096  # bytes; ECRYPTFS_DEFAULT_EXTENT_SIZE
_ROUNDS = 65536  # ECRYPTFS_DEFAULT_NUM_HASH_ITERATIONS
_NUMBER = 16  # bytes of an extent's number in what is hashed


def check_cipher(code: int) -> None:
    """PeerError unless files with this cipher (RFC 2440 code) can be decrypted here."""
    if code not in AES_SIZES:
        name = CIPHER_NAMES.get(code, f"{code:#04x}")
        raise PeerError("file key", f"is for the cipher {name}: only AES is read without the kernel")


class FileCipher:
    """Decrypts the extents of one file. `key`: PeerError unless it is for AES."""

    def __init__(self, key: FileKey) -> None:
        check_cipher(key.cipher)
        self._algorithm = algorithms.AES(key.key)
        self._root_iv = _md5(key.key)

    def decrypt(self, number: int, extent: bytes) -> bytes:
        """Returns the clear bytes of the extent with this number, which are as many; EXTENT, or a multiple of 16."""
        iv = _md5(self._root_iv + str(number).encode().ljust(_NUMBER, b"\0"))
        decryptor = Cipher(self._algorithm, modes.CBC(iv)).decryptor()
        return decryptor.update(extent) + decryptor.finalize()


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def decrypted(fd: int, at: int, size: int, cipher: FileCipher) -> Iterator[bytes]:
    """Yields the clear contents of a lower file. `at`: offset of its data; `size`: of the file in clear. PeerError at
    the first byte of the lower file that is missing; OSError."""
    left, number = size, 0
    while left:
        extents = min(_CHUNK, -(-left // EXTENT))
        data = _read(fd, at + number * EXTENT, extents * EXTENT)
        whole = len(data) // EXTENT
        parts = (cipher.decrypt(number + one, data[one * EXTENT : (one + 1) * EXTENT]) for one in range(whole))
        clear = b"".join(parts)[:left]
        yield clear
        if whole < extents:
            where = at + number * EXTENT + len(data)
            raise PeerError("lower file", f"ends before the {size} bytes that its header says", where)
        left -= len(clear)
        number += extents


def _read(fd: int, at: int, size: int) -> bytes:
    parts, end = [], at + size
    while at < end and (part := os.pread(fd, end - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


class PassphraseKey(NamedTuple):
    """A key made of a mount passphrase. `signature`: as in the packets of its files."""

    signature: str
    key: bytes  # 64 bytes, of which a cipher takes the first

    def __repr__(self) -> str:
        return f"PassphraseKey({self.signature!r})"


def stretch(passphrase: bytes | bytearray, salt: bytes) -> PassphraseKey:
    """Makes the key of a mount passphrase. `salt`: 8 bytes, of the packet. Takes about 50 ms."""
    key = salt + bytes(passphrase)
    for _ in range(_ROUNDS):
        key = hashlib.sha512(key).digest()
    return PassphraseKey(hashlib.sha512(key).digest()[:8].hex(), key)


def unwrap_by_passphrase(packet: PassphrasePacket, key: PassphraseKey) -> FileKey:
    """Unwraps a file's key. PeerError if another passphrase wrapped it, or the cipher is not AES."""
    check_cipher(packet.cipher)
    if key.signature != packet.signature:
        raise PeerError("tag 3 packet", f"another passphrase wrapped it, with the signature {packet.signature}")
    size = packet.key_size  # as for tag 1, the code of AES-128 may stand for any size of key
    if size not in AES_SIZES.values() or len(packet.wrapped) % 16:
        raise PeerError("tag 3 packet", f"a wrapped key of {len(packet.wrapped)} bytes for AES")
    decryptor = Cipher(algorithms.AES(key.key[:size]), modes.ECB()).decryptor()  # noqa: S305 - the format's own
    clear = decryptor.update(packet.wrapped) + decryptor.finalize()
    return FileKey(next(code for code, of in AES_SIZES.items() if of == size), clear[:size])
