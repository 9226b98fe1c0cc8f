"""Obtains a token's PIN from a prompt or file, and tries each wrong PIN only once.

A token counts wrong PINs and locks itself after a few, so no PIN is tried again automatically.
"""

from __future__ import annotations

import threading
from typing import Protocol

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import Secrets
from upcall.keys.private_file import Fingerprint, read_private

MAX_PIN = 255  # bytes; also of its file
_refused: dict[tuple[str, str], Fingerprint] = {}  # (token, file): the file's state when its PIN was wrong
_lock = threading.Lock()


class Pins(Protocol):
    """A source of a token's PIN, for one key. The caller wipes the PIN."""

    careful: bool  # unattended: must leave the token's last attempt to a person

    def pin(self, token: str, prompt: str) -> bytearray: ...
    def verdict(self, token: str, good: bool) -> None: ...


class AskedPins:
    """Asks the daemon, which prompts a person."""

    careful = False

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def pin(self, token: str, prompt: str) -> bytearray:
        pin = self._secrets.pin(token, prompt)
        if not pin:
            raise Refused("locked")
        return pin

    def verdict(self, token: str, good: bool) -> None:
        self._secrets.verdict(token, good)


class FilePins:
    """Reads the PIN from a file, `pin-source=file:/path`, for unattended use. A wrong PIN is not tried again until the
    file changes."""

    careful = True

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: Fingerprint | None = None

    def pin(self, token: str, prompt: str) -> bytearray:
        try:
            pin, found = read_private(self._path, MAX_PIN + 1)
        except OSError as error:
            raise ModuleFailed(f"{self._path}: {error.strerror}") from None
        if pin.endswith(b"\n"):
            del pin[-1]
        with _lock:
            self._read = found
            wrong = _refused.get((token, self._path)) == found
        if wrong or not 0 < len(pin) <= MAX_PIN:
            pin[:] = bytes(len(pin))
            raise ModuleFailed(f"{self._path}: " + ("the PIN in it is wrong" if wrong else "holds no PIN"))
        return pin

    def verdict(self, token: str, good: bool) -> None:
        with _lock:
            if not good and self._read is not None:
                _refused[token, self._path] = self._read
