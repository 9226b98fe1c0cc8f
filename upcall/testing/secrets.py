"""Supplies a key module with PINs and passphrases from the test."""

from __future__ import annotations

from upcall.core.errors import Refused


class GivenSecrets:
    """Implements `keymodule.Secrets` with one passphrase, and one PIN for each or any token. Refused("locked")
    without.

    `given`: all buffers that the module received, and must wipe. `sources`, `verdicts`, `touches`: the arguments of
    the module's calls.
    """

    def __init__(
        self, passphrase: bytes | None = None, pins: dict[str, bytes] | None = None, pin: bytes | None = None
    ) -> None:
        self._passphrase, self._pins, self._pin = passphrase, pins or {}, pin
        self.given: list[bytearray] = []
        self.sources: list[str] = []  # of the requested passphrases
        self.verdicts: list[tuple[str, bool]] = []
        self.touches: list[str] = []

    def passphrase(self, source: str, /) -> bytearray:
        self.sources.append(source)
        return self._give(self._passphrase)

    def pin(self, token: str, prompt: str, /) -> bytearray:
        return self._give(self._pins.get(token, self._pin))

    def verdict(self, token: str, good: bool, /) -> None:
        self.verdicts.append((token, good))

    def touch(self, token: str, prompt: str, /) -> None:
        self.touches.append(token)

    def wiped(self) -> bool:
        """Returns whether the module has wiped all buffers that it received."""
        return not any(any(buffer) for buffer in self.given)

    def _give(self, secret: bytes | None) -> bytearray:
        if secret is None:
            raise Refused("locked")
        self.given.append(bytearray(secret))
        return self.given[-1]
