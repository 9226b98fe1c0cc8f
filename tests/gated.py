"""Implements a toy key module for tests. While there is a gate, opening a key blocks until the test releases it."""

from __future__ import annotations

import contextlib
import socket

from upcall.keymodule import Secrets
from upcall.testing.toy import ToyKey, ToyModule


class _Gated(ToyModule):
    """The module. Its blob: the gate's path, NUL, the toy's blob."""

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> ToyKey:
        path, _, rest = blob.partition(b"\0")
        with socket.socket(socket.AF_UNIX) as gate, contextlib.suppress(OSError):
            gate.connect(path)
            gate.recv(1)
        return super().open(signature, rest, secrets)


GATED = _Gated()
