"""Defines the interface by which the key service prompts for PINs and passphrases; see upcall.daemon.prompter."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from upcall.core.errors import Refused
from upcall.core.messages import Requester

PATIENT = 5.0  # seconds before its deadline from which a request does not wait for a prompt


def _never() -> bool:
    return False


class Asker(NamedTuple):
    """The request that needs a prompt: its service, requester and deadline (seconds of CLOCK_MONOTONIC). `locked()`:
    whether its key has been locked meanwhile; the prompter calls it under its own lock, before it opens a prompt."""

    service: str
    requester: Requester
    deadline: float
    locked: Callable[[], bool] = _never

    def patient(self) -> bool:
        """Returns whether the request can wait for a prompt. Never for eCryptfs: the kernel's time-out is 3 s."""
        return self.deadline - time.monotonic() >= PATIENT


class Prompter(Protocol):
    """Prompts for PINs and passphrases, on behalf of `keymodule.Secrets`. Thread-safe."""

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray: ...
    def verdict(self, token: str, good: bool, /) -> None: ...
    def touch(self, token: str, prompt: str, asker: Asker, /) -> None: ...
    def passphrase(
        self, signature: str, asker: Asker, kept: Callable[[], bytearray | None], tried: Callable[[bytearray], bool], /
    ) -> bytearray:
        """Prompts for a key's passphrase and returns it, by calling `kept`. Refused: "prompting", "locked".

        `tried(typed)`: returns whether the passphrase opens the key, and keeps it then; Refused if that cannot be
        determined. It is called in a thread of its own."""

    def over(self) -> None:
        """Ends the calling thread's request. A PIN that it got without a verdict counts as wrong."""

    def lock(self) -> None:
        """Wipes all PINs and withdraws all prompts."""

    def unlock(self) -> None:
        """Allows prompts again, also after wrong PINs: a person has unlocked a key."""

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        """Takes over a connection of `upcall prompt` and sends `welcome` on it. Does not block. Refused."""


class NoPrompter:
    """A Prompter without methods of prompting: refuses every request."""

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray:
        raise Refused("locked")

    def passphrase(
        self, signature: str, asker: Asker, kept: Callable[[], bytearray | None], tried: Callable[[bytearray], bool], /
    ) -> bytearray:
        raise Refused("locked")

    def verdict(self, token: str, good: bool, /) -> None:
        return None

    def touch(self, token: str, prompt: str, asker: Asker, /) -> None:
        return None

    def over(self) -> None:
        return None

    def lock(self) -> None:
        return None

    def unlock(self) -> None:
        return None

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        raise Refused("no-service")
