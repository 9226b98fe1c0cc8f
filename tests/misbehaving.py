"""Implements a key module that misbehaves as its auth token specifies: "verb argument"."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, NoReturn

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import API, Secrets
from upcall.testing.toy import TOY, ToyKey, make_toy_key
from upcall.wire.envelope import Envelope

SECRET = "correct-horse-battery-staple"


class BadKey:
    def __init__(self, good: ToyKey, verb: str, argument: str) -> None:
        self._good, self._verb, self._argument = good, verb, argument
        self._calls = 0

    def wrap(self, key: bytes, /) -> Any:
        self._calls += 1
        wrapped = self._good.wrap(key)
        act = getattr(self, f"_{self._verb}", None)
        return act(key, wrapped) if act else wrapped

    def unwrap(self, wrapped: bytes, /) -> Any:
        if self._verb == "unwrap_none":
            return None
        if self._verb == "unwrap_other":
            return b"\0not a file key"
        return self._good.unwrap(wrapped)

    def stale(self) -> bool:
        if self._verb == "stale_raises":
            raise RuntimeError(SECRET)
        return False

    def _raise(self, key: bytes, wrapped: bytes) -> NoReturn:
        raise RuntimeError(SECRET)

    def _exit(self, key: bytes, wrapped: bytes) -> NoReturn:
        raise SystemExit(SECRET)

    def _interrupt(self, key: bytes, wrapped: bytes) -> NoReturn:
        raise KeyboardInterrupt(SECRET)

    def _fail(self, key: bytes, wrapped: bytes) -> NoReturn:
        raise ModuleFailed("the card was pulled out")

    def _refuse(self, key: bytes, wrapped: bytes) -> NoReturn:
        raise Refused("locked")

    def _none(self, key: bytes, wrapped: bytes) -> None:
        return None

    def _text(self, key: bytes, wrapped: bytes) -> str:
        return wrapped.hex()

    def _empty(self, key: bytes, wrapped: bytes) -> bytes:
        return b""

    def _short(self, key: bytes, wrapped: bytes) -> bytes:
        return wrapped[: len(key) - 1]

    def _long(self, key: bytes, wrapped: bytes) -> bytes:
        return wrapped + bytes(513 - len(wrapped))

    def _huge(self, key: bytes, wrapped: bytes) -> bytes:
        return bytes(100_000)

    def _clear(self, key: bytes, wrapped: bytes) -> bytes:
        return key + bytes(40)

    def _same(self, key: bytes, wrapped: bytes) -> bytes:
        return key

    def _garbage(self, key: bytes, wrapped: bytes) -> bytes:
        return os.urandom(len(wrapped))

    def _later(self, key: bytes, wrapped: bytes) -> bytes:
        """Wraps correctly at first; then returns garbage of another size."""
        return wrapped if self._calls == 1 else wrapped + b"x"

    def _clear_later(self, key: bytes, wrapped: bytes) -> bytes:
        """Wraps correctly at first; then returns the same size, with the clear key in it."""
        return wrapped if self._calls == 1 else key.ljust(len(wrapped))

    def _gate(self, key: bytes, wrapped: bytes) -> bytes:
        """Reports its arrival to the test's gate, and waits for its release."""
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(self._argument)
            gate.recv(1)
        return wrapped


class BadModule:
    name = "bad"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> BadKey:
        verb, _, argument = blob.decode().partition(" ")
        if verb == "open_raises":
            raise RuntimeError(SECRET)
        if verb == "key":
            name, good = make_toy_key(Path(argument or "/tmp"))
        else:  # an unnamed file, which exists as long as the descriptor
            file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
            name, good = make_toy_key(Path(f"/proc/self/fd/{file}"))
        return BadKey(TOY.open(name, good, secrets), verb, argument)


BAD = BadModule()


class BadHandler:
    """A handler that misbehaves as the request's body specifies."""

    services = ("bad",)

    def lane(self, envelope: Envelope, /) -> str:
        if envelope.body == b"lane":
            raise RuntimeError(SECRET)
        return [] if envelope.body == b"lane of a wrong type" else "bad"  # type: ignore[return-value]

    def kind(self, envelope: Envelope, /) -> str:
        if envelope.body == b"kind":
            raise RuntimeError(SECRET)
        return [] if envelope.body == b"kind of a wrong type" else "bad"  # type: ignore[return-value]

    def answer(self, envelope: Envelope, /) -> Any:
        results = {b"none": None, b"text": "text", b"huge": bytes(100_000), b"good": b"it"}
        if envelope.body in results:
            return results[envelope.body]
        raise RuntimeError(SECRET)


HANDLER = BadHandler()
