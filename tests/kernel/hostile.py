"""Key modules and daemons that do what they must not."""

from __future__ import annotations

from collections.abc import Callable

from upcall_rsa import module as openssl

from upcall.keymodule import API, KeyHandle, Secrets
from upcall.wire.netlink import Envelope

Verb = Callable[[KeyHandle, bytes], object]


class _Handle:
    def __init__(self, real: KeyHandle, wrap: Verb | None, unwrap: Verb | None) -> None:
        self._real, self._wrap, self._unwrap = real, wrap, unwrap

    def wrap(self, key: bytes, /) -> bytes:
        return self._real.wrap(key) if self._wrap is None else self._wrap(self._real, key)  # type: ignore[return-value]

    def unwrap(self, wrapped: bytes, /) -> bytes:
        if self._unwrap is None:
            return self._real.unwrap(wrapped)
        return self._unwrap(self._real, wrapped)  # type: ignore[return-value]

    def stale(self) -> bool:
        return False


class HostileModule:
    """Opens keys as the openssl module does; a verb that is given replaces the handle's."""

    name, api = "openssl", API

    def __init__(self, wrap: Verb | None = None, unwrap: Verb | None = None) -> None:
        self._wrap, self._unwrap = wrap, unwrap

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        return _Handle(openssl.open(signature, blob, secrets), self._wrap, self._unwrap)


class LyingDaemon:
    """A handler without the daemon's own checks: whatever `answer` gives goes to the broker."""

    services: tuple[str, ...] = ("ecryptfs",)

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer

    def lane(self, envelope: Envelope, /) -> str:
        return "the only one"

    def answer(self, envelope: Envelope, /) -> bytes:
        return self._answer(envelope.body)
