"""Measures key modules alone: wraps and unwraps of one thread per second of processor time, and the time of opening.

    python -m bench.modules

X25519 is compared with the same primitives called directly, without HPKE's key schedule.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from bench.rows import FULL, Effort, Row, bounded, by_turns, show
from bench.stage import BenchError, Stage
from upcall.core.errors import ModuleFailed
from upcall.keymodule import MAX_KEY, KeyHandle, KeyMaker, KeyModule, Limits, Making
from upcall.keys.enrolment import chosen
from upcall.keys.plugins import load
from upcall.testing.secrets import GivenSecrets

_GROUP = "key modules, one thread of one processor"
_PASSPHRASE = b"correct horse battery staple"
_BATCH = 50  # calls between two readings of the clock
_SHARE = 0.2  # of the time of a throughput, because there are many
_GOAL = 10_000  # X25519 operations per second; below, it would need threads of its own
_LONGEST_OPENING = 1000.0  # ms, within the kernel's time-out


class _Contender(NamedTuple):
    name: str
    spec: str
    values: dict[str, str]
    goal: int | None = None
    beside: str = ""


_BY_HAND = "by hand"
_CONTENDERS = (
    _Contender("RSA-2048", "upcall_rsa:module", {"bits": "2048"}),
    _Contender("RSA-3072", "upcall_rsa:module", {"bits": "3072"}),
    _Contender("X25519", "upcall_x25519:module", {}, _GOAL, _BY_HAND),
    _Contender("passphrase", "upcall_passphrase:module", {}),
)


class _ByHand:
    """Calls X25519, HKDF and AES-256-GCM one after the other."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self._public = self._private.public_key()

    def wrap(self, key: bytes, /) -> bytes:
        ephemeral = X25519PrivateKey.generate()
        sent = ephemeral.public_key().public_bytes_raw()
        return sent + self._cipher(ephemeral.exchange(self._public), sent).encrypt(bytes(12), key, None)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        sent = wrapped[:32]
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(sent))
        return self._cipher(shared, sent).decrypt(bytes(12), wrapped[32:], None)

    def _cipher(self, shared: bytes, sent: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), 32, None, sent + self._public.public_bytes_raw()).derive(shared))


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    handles: dict[str, KeyHandle] = {_BY_HAND: _ByHand()}
    for contender in _CONTENDERS:
        open_it = _opener(contender, stage.folder)
        handles[contender.name] = open_it()
        took = statistics.median(_milliseconds(open_it) for _ in range(effort.rounds))
        yield bounded(_GROUP, f"{contender.name}, opening", "ms", took, _LONGEST_OPENING)
    measured: dict[str, Callable[[], float]] = {}
    for name, handle in handles.items():
        clear = os.urandom(MAX_KEY)
        wrapped = handle.wrap(clear)
        if handle.unwrap(wrapped) != clear:
            raise BenchError(f"{name} does not unwrap what it wrapped")
        measured[f"{name}, wraps"] = partial(_per_second, partial(handle.wrap, clear), effort.seconds * _SHARE)
        measured[f"{name}, unwraps"] = partial(_per_second, partial(handle.unwrap, wrapped), effort.seconds * _SHARE)
    found = by_turns(measured, effort.rounds)
    for contender in _CONTENDERS:
        for verb in ("wraps", "unwraps"):
            beside = found[f"{contender.beside}, {verb}"] if contender.beside else None
            yield _row(contender, verb, found[f"{contender.name}, {verb}"], beside)


def _row(contender: _Contender, verb: str, ours: list[float], peer: list[float] | None) -> Row:
    median = statistics.median(ours)
    row = Row(_GROUP, f"{contender.name}, {verb}", "/s", median)
    if peer is not None:
        ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
        row = row._replace(peer=statistics.median(peer), peer_is=contender.beside, ratio=ratio)
    if contender.goal is not None:
        row = row._replace(goal=f">= {contender.goal:,} /s", met=median >= contender.goal)
    return row if peer is None else row.judged(ours, peer)


def _opener(contender: _Contender, folder: Path) -> Callable[[], KeyHandle]:
    """Makes a key. Returns a function that opens it."""
    try:
        module: KeyModule = load(contender.spec)
    except ModuleFailed as error:
        raise BenchError(str(error)) from None
    if not isinstance(module, KeyMaker):
        raise BenchError(f"{contender.spec} makes no keys")
    values = chosen(module.parameters, contender.values)
    path = folder / f"{contender.name}{module.suffix}"
    secrets = GivenSecrets(_PASSPHRASE)
    made = module.generate(Making(path, values, bytearray(_PASSPHRASE), "ask", Limits(), secrets))
    return lambda: module.open(made.signature, made.blob, secrets)


def _milliseconds(work: Callable[[], object]) -> float:
    """Returns the wall-clock time of `work`, which counts for the kernel's time-out."""
    start = time.monotonic()
    work()
    return (time.monotonic() - start) * 1000


def _per_second(work: Callable[[], object], seconds: float) -> float:
    """Returns calls per second of processor time, to reduce the influence of other processes."""
    count, start = 0, time.thread_time()
    while (took := time.thread_time() - start) < seconds:
        for _ in range(_BATCH):
            work()
        count += _BATCH
    return count / took


if __name__ == "__main__":
    with Stage() as the_stage:
        show(list(rows(the_stage, FULL)))
