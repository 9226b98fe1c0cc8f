"""Implements a key module for tests, with keys in files. It passes the contract. Its cipher is not secure."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from upcall.core.errors import ModuleFailed
from upcall.keymodule import API, Secrets

_NONCE, _MAC = 16, 32


def make_toy_key(path: Path, passphrase: bytes = b"") -> tuple[str, bytes]:
    """Writes a new key to `path`. Returns its signature, and the blob for its auth token. If `passphrase` is not
    empty, opening the key asks for it."""
    salt = os.urandom(32)
    path.write_bytes(salt + hashlib.sha256(salt + passphrase).digest())
    source = b"ask" if passphrase else b""
    return _signature(salt), os.fsencode(path) + b"\0" + source


def _signature(salt: bytes) -> str:
    return hashlib.sha256(b"signature" + salt).hexdigest()[:16]


class ToyKey:
    """An opened key."""

    def __init__(self, path: Path, secret: bytes, seen: tuple[int, int]) -> None:
        self._path, self._secret, self._seen = path, secret, seen

    def wrap(self, key: bytes, /) -> bytes:
        nonce = os.urandom(_NONCE)
        body = nonce + self._mix(nonce, key)
        return body + hmac.digest(self._secret, body, "sha256")

    def unwrap(self, wrapped: bytes, /) -> bytes:
        body, mac = wrapped[:-_MAC], wrapped[-_MAC:]
        if len(body) <= _NONCE or not hmac.compare_digest(hmac.digest(self._secret, body, "sha256"), mac):
            raise ModuleFailed("this key did not wrap it")
        return self._mix(body[:_NONCE], body[_NONCE:])

    def _mix(self, nonce: bytes, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._secret + nonce).digest(len(data))
        return bytes(a ^ b for a, b in zip(stream, data, strict=True))

    def stale(self) -> bool:
        try:
            return _seen(self._path) != self._seen
        except OSError:
            return True


def _seen(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino


class ToyModule:
    """Opens keys made by `make_toy_key`."""

    name = "toy"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> ToyKey:
        name, _, source = blob.partition(b"\0")
        path = Path(os.fsdecode(name))
        try:
            seen, data = _seen(path), path.read_bytes()
        except (OSError, ValueError) as error:
            raise ModuleFailed(f"no key: {error}") from error
        salt = data[:32]
        if len(data) != 64 or _signature(salt) != signature:
            raise ModuleFailed(f"{path}: is not the key {signature}")
        passphrase = secrets.passphrase(source.decode("ascii", "replace")) if source else bytearray()
        fits = hashlib.sha256(salt + passphrase).digest() == data[32:]
        secret = hashlib.sha256(b"secret" + salt + passphrase).digest()
        passphrase[:] = bytes(len(passphrase))
        if not fits:
            raise ModuleFailed(f"{path}: the passphrase does not fit")
        return ToyKey(path, secret, seen)


TOY = ToyModule()
