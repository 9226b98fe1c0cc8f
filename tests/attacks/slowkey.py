"""Implements a slow toy key, as tokens are, so that requests are pending while a process is killed."""

from __future__ import annotations

import time

from upcall.keymodule import API, Secrets
from upcall.testing.toy import TOY, ToyKey

_SECONDS = 0.003


class SlowKey:
    def __init__(self, toy: ToyKey) -> None:
        self._toy = toy

    def wrap(self, key: bytes, /) -> bytes:
        return self._toy.wrap(key)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        time.sleep(_SECONDS)
        return self._toy.unwrap(wrapped)

    def stale(self) -> bool:
        return self._toy.stale()


class SlowModule:
    name = "slow"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> SlowKey:
        return SlowKey(TOY.open(signature, blob, secrets))


SLOW = SlowModule()
