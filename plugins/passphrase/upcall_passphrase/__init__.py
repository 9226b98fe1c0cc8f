"""Derives keys from passphrases, without storing them: `upcall_passphrase.derived` derives a key when it is opened.

A file's key is wrapped with AES key wrap with padding (RFC 5649), AES-256: 67 bytes become 80. It is deterministic:
the same key gives the same wrapped key. That is safe because files' keys are random and unique.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from upcall.core.errors import ModuleFailed, PeerError, UsageError
from upcall.keymodule import API, MAX_KEY, Enrolled, Making, Parameter, Secrets
from upcall.keys.base import check_clear, check_room, check_source, self_test, wipe
from upcall_passphrase.blob import Blob, pack_blob, signature_of, take_blob
from upcall_passphrase.derived import SALT, Cost, Derived, check_cost, derive

__all__ = ["Handle", "PassphraseModule", "module"]

MIN_COST: Final = 64  # MiB times passes, of a new key
MAX_SECONDS: Final = 1.0  # of processor time to open a new key; the kernel's time-out is 3 s

_BLOCK: Final = 8  # bytes


def wrapped_size(size: int) -> int:
    """Returns the wrapped size in bytes of a key of `size` bytes: padded, plus one block."""
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK + _BLOCK


MAX_WRAPPED: Final = wrapped_size(MAX_KEY)


class Handle:
    """A KeyHandle of a derived key. A lock serialises the verbs with `close`, which wipes the key."""

    def __init__(self, kek: bytearray) -> None:
        """`kek`: the wrapping key, 32 bytes; `close` wipes it."""
        self._kek = kek
        self._open = True
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        return f"Handle({'open' if self._open else 'closed'})"

    def wrap(self, key: bytes, /) -> bytes:
        """Wraps a key. Returns 16 to 80 bytes: the size of `key`, padded to a multiple of 8, plus 8."""
        check_clear(key)
        with self._turn:
            self._check_open()
            return aes_key_wrap_with_padding(self._kek, key)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        if len(wrapped) % _BLOCK or not 2 * _BLOCK <= len(wrapped) <= MAX_WRAPPED:
            raise ModuleFailed(f"{len(wrapped)} bytes, {2 * _BLOCK} to {MAX_WRAPPED} are possible, by eights")
        key = b""
        with self._turn:
            self._check_open()
            with contextlib.suppress(InvalidUnwrap):  # replaced below: the library's text does not help
                key = aes_key_unwrap_with_padding(self._kek, wrapped)
        if not 1 <= len(key) <= MAX_KEY:
            raise ModuleFailed(f"this key did not wrap these {len(wrapped)} bytes")
        return key

    def close(self) -> None:
        """Wipes the key. Later calls raise ModuleFailed."""
        with self._turn:
            self._open = False
            wipe(self._kek)

    def _check_open(self) -> None:
        if not self._open:  # wrapping with a wiped key, all zeros, would disclose the file
            raise ModuleFailed("the key was closed")


class PassphraseModule:
    """A KeyModule and KeyMaker for keys that are derived from passphrases. Thread-safe."""

    name = "passphrase"
    api = API
    suffix = ""
    takes_passphrase = True
    parameters: tuple[Parameter, ...] = (
        Parameter("memory", "Memory that each guess costs, in MiB.", "64", choices=("32", "64", "128", "256")),
        Parameter("passes", "How often that memory is gone through.", "3", choices=("1", "2", "3", "4", "6", "8")),
    )

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        """Derives the key: 0.15 s with the defaults, at most 0.5 s, on an ordinary processor. See `KeyModule.open`."""
        try:
            told = take_blob(blob)
        except PeerError as error:
            raise ModuleFailed(str(error)) from error
        if (theirs := signature_of(told)) != signature:
            raise ModuleFailed(f"the blob is that of the key {theirs}, the auth token is for {signature}")
        passphrase = secrets.passphrase(told.source)
        try:
            derived = _derive(passphrase, told.salt, told.cost)
        finally:
            wipe(passphrase)
        if not bytes_eq(derived.check, told.check):
            wipe(derived.kek)
            raise ModuleFailed(f"a wrong passphrase for the key {signature}")
        return Handle(derived.kek)

    def generate(self, making: Making, /) -> Enrolled:
        """Makes a key with a new salt. Writes no file: the blob is needed to derive the key again."""
        check_source(making.source, none=False)
        if not making.passphrase:
            raise UsageError("a key that is made of a passphrase needs one")
        check_room(wrapped_size(making.limits.key), making.limits)
        cost, salt = _cost(making), os.urandom(SALT)
        before = time.thread_time()
        derived = _derive(making.passphrase, salt, cost)
        took = time.thread_time() - before
        handle = Handle(derived.kek)
        try:
            if took > MAX_SECONDS:
                raise ModuleFailed(
                    f"it takes {took:.1f} s to open such a key here: choose less memory or fewer passes"
                )
            self_test(handle.wrap, handle.unwrap)
        finally:
            handle.close()
        blob = Blob(cost, salt, derived.check, making.source)
        return Enrolled(signature_of(blob), pack_blob(blob), f"Argon2id, {cost.memory} MiB x {cost.passes}")


def _cost(making: Making) -> Cost:
    try:
        cost = Cost(int(making.values["memory"]), int(making.values["passes"]))
    except (KeyError, ValueError):
        raise UsageError("`memory` and `passes` are numbers") from None
    check_cost(cost)
    if cost.memory * cost.passes < MIN_COST:
        raise UsageError(f"{cost.memory} MiB gone through {cost.passes} times is too cheap to guess at")
    return cost


def _derive(passphrase: bytearray, salt: bytes, cost: Cost) -> Derived:
    try:
        return derive(passphrase, salt, cost)
    except UnsupportedAlgorithm:
        raise ModuleFailed("the OpenSSL that cryptography was built with has no Argon2id: 3.2 or newer has") from None
    except MemoryError:
        raise ModuleFailed(f"there is no memory of {cost.memory} MiB to derive the key in") from None


module = PassphraseModule()
