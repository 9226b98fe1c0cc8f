"""Defines the interface by which the key service prompts for PINs and passphrases; see upcall.daemon.prompter."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from upcall.core.errors import Refused
from upcall.core.messages import Requester

PATIENT = 5.0  # seconds before its deadline from which a request does not wait for a prompt


class Asker(NamedTuple):
    """The request that needs a prompt: its service, requester and deadline (seconds of CLOCK_MONOTONIC)."""

    service: str
    requester: Requester
    deadline: float

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
        """A key's passphrase, typed now, which `kept` then gives. Refused: "prompting", "locked".

        `tried(typed)`: whether it opens the key, and is kept from now on; Refused if that cannot be known. It is
        called in a thread of its own."""

    def over(self) -> None:
        """The calling thread is done with its request: a verdict that has not come comes no more."""

    def lock(self) -> None:
        """Forgets every PIN, and takes back what people are being asked."""

    def unlock(self) -> None:
        """A person is there: they may be asked again, whatever was wrong before."""

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        """Takes over a connection of `upcall prompt`, which is to be sent `welcome`, or Refused. Never waits."""


class NoPrompter:
    """Where nobody can be asked."""

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
