"""A key module for tests: a toy whose keys open when the test says so, while there is a gate."""

from __future__ import annotations

import contextlib
import socket

from upcall.keymodule import Secrets
from upcall.testing.toy import ToyKey, ToyModule


class _Gated(ToyModule):
    """The blob: the gate's path, a NUL, the toy's blob."""

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> ToyKey:
        path, _, rest = blob.partition(b"\0")
        with socket.socket(socket.AF_UNIX) as gate, contextlib.suppress(OSError):
            gate.connect(path)
            gate.recv(1)
        return super().open(signature, rest, secrets)


GATED = _Gated()
