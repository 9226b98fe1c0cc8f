"""Loads the daemon's prompting with the first prompt: most daemons never need it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from upcall.core.errors import UsageError
from upcall.daemon.prompting.settings import WAYS, PromptSettings
from upcall.daemon.secrets import Asker
from upcall.process.log import EventLog

if TYPE_CHECKING:
    from upcall.daemon.prompting.prompts import Prompts


class LazyPrompter:
    """Implements `upcall.daemon.secrets.Prompter`."""

    def __init__(self, settings: PromptSettings, log: EventLog, lock_after: float = 0.0) -> None:
        """`lock_after`: seconds without use after which keys are closed; 0: never. UsageError: an unknown method."""
        if unknown := sorted(set(settings.ways) - set(WAYS)):
            raise UsageError(f"no way to ask is called {unknown[0]!r}: there are {', '.join(WAYS)}")
        # A key that was closed by lock_after must not be opened again with a remembered PIN.
        pin_time = min(lock_after or settings.pin_time, settings.pin_time)
        self._settings, self._log = settings._replace(pin_time=pin_time), log
        self._lock = threading.Lock()
        self._prompts: Prompts | None = None

    def _loaded(self) -> Prompts:
        with self._lock:
            if self._prompts is None:
                from upcall.daemon.prompting.methods import prompts

                self._prompts = prompts(self._settings, self._log)
            return self._prompts

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray:
        return self._loaded().pin(token, prompt, asker)

    def passphrase(
        self, signature: str, asker: Asker, kept: Callable[[], bytearray | None], tried: Callable[[bytearray], bool], /
    ) -> bytearray:
        return self._loaded().passphrases.ask(signature, asker, kept, tried)

    def verdict(self, token: str, good: bool, /) -> None:
        self._loaded().verdict(token, good)

    def touch(self, token: str, prompt: str, asker: Asker, /) -> None:
        self._loaded().touch(token, prompt, asker)

    def over(self) -> None:
        if self._prompts is not None:
            self._prompts.over()

    def lock(self) -> None:
        if self._prompts is not None:
            self._prompts.lock()

    def unlock(self) -> None:
        if self._prompts is not None:
            self._prompts.unlock()

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        self._loaded().attach(connection, welcome)
