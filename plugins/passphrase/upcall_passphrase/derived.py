"""Derives a wrapping key from a passphrase: Argon2id (RFC 9106), then HKDF-Expand (RFC 5869) for each use.

    root  = Argon2id(passphrase, salt, memory, passes, 4 lanes), 32 bytes
    kek   = HKDF-Expand-SHA256(root, "upcall passphrase 1: key"), 32 bytes
    check = HKDF-Expand-SHA256(root, "upcall passphrase 1: check"), 16 bytes

The check value is stored in the blob and detects a wrong passphrase. It does not help to find the kek, except by
guessing the passphrase, at the full cost of the derivation for each guess.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from upcall.core.errors import UsageError
from upcall.keys.base import wipe

SALT: Final = 16  # bytes, as RFC 9106 recommends
CHECK: Final = 16  # bytes
LANES: Final = 4  # RFC 9106, 4
MIB: Final = 1024  # KiB, the unit of Argon2
MAX_MEMORY: Final = 256  # MiB
MAX_PASSES: Final = 8
MAX_COST: Final = 512  # MiB times passes: half a second on an ordinary processor, within the kernel's time-out of 3 s

_ROOT: Final = 32
_KEK: Final = 32
_FOR_KEK: Final = b"upcall passphrase 1: key"
_FOR_CHECK: Final = b"upcall passphrase 1: check"

_one_at_a_time = threading.Lock()  # one derivation needs much memory, and parallel ones would slow it down


class Cost(NamedTuple):
    """The cost of one derivation: memory in MiB, and the number of passes over it."""

    memory: int
    passes: int


class Derived(NamedTuple):
    """The result of a derivation. The caller wipes `kek`, which is secret."""

    kek: bytearray
    check: bytes

    def __repr__(self) -> str:
        return f"Derived(kek=<{len(self.kek)} bytes>)"


def check_cost(cost: Cost) -> None:
    """UsageError if the cost exceeds the limits of memory or time."""
    memory, passes = cost
    if not (1 <= memory <= MAX_MEMORY and 1 <= passes <= MAX_PASSES and memory * passes <= MAX_COST):
        raise UsageError(
            f"{memory} MiB gone through {passes} times: at most {MAX_MEMORY} MiB, {MAX_PASSES} times, "
            f"and {MAX_COST} of both multiplied are possible"
        )


def stretch(passphrase: bytearray, salt: bytes, memory: int, passes: int, lanes: int, size: int) -> bytearray:
    """Computes Argon2id version 1.3. `memory`: KiB. Returns `size` bytes, which the caller wipes."""
    out = bytearray(size)
    kdf = Argon2id(salt=salt, length=size, iterations=passes, lanes=lanes, memory_cost=memory)
    with _one_at_a_time:
        kdf.derive_into(passphrase, out)  # type: ignore[arg-type] # it accepts any buffer
    return out


def derive(passphrase: bytearray, salt: bytes, cost: Cost) -> Derived:
    """Derives key and check value. Needs `cost.memory` MiB, and 0.5 to 1 ms for each MiB and pass. Blocks while
    another derivation runs. Does not wipe `passphrase`."""
    root = stretch(passphrase, salt, cost.memory * MIB, cost.passes, LANES, _ROOT)
    try:
        kek = bytearray(_KEK)
        HKDFExpand(SHA256(), _KEK, _FOR_KEK).derive_into(root, kek)
        return Derived(kek, HKDFExpand(SHA256(), CHECK, _FOR_CHECK).derive(root))
    finally:
        wipe(root)
