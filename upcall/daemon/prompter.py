"""The prompter of a daemon that may never need one: what asks is imported with the first prompt."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from upcall.core.errors import UsageError
from upcall.daemon.prompting.settings import PIN_TIME, PROMPT_TIME, Settings
from upcall.daemon.secrets import Asker
from upcall.process.log import EventLog

if TYPE_CHECKING:
    from upcall.daemon.prompting.prompts import Prompts

WAYS = ("agent", "pinentry", "systemd")  # see upcall.daemon.prompting.methods


class LazyPrompter:
    """`asking.Prompter`, by the daemon's arguments `ask=`, `pinentry=`, `pin-time=`, `prompt-time=`
    and `lock-after=`."""

    def __init__(self, arguments: Iterable[str], log: EventLog) -> None:
        settings = dict(argument.split("=", 1) for argument in arguments)
        self._log = log
        self._pinentry = settings.get("pinentry")
        # A key that was closed by lock-after must not be opened again with a remembered PIN.
        lock_after = float(settings.get("lock-after", 0)) or math.inf
        self._pin_time = min(lock_after, float(settings.get("pin-time", PIN_TIME)))
        self._prompt_time = float(settings.get("prompt-time", PROMPT_TIME))
        self._ways = tuple(filter(None, settings["ask"].split(","))) if "ask" in settings else WAYS
        if unknown := sorted(set(self._ways) - set(WAYS)):
            raise UsageError(f"no way to ask is called {unknown[0]!r}: there are {', '.join(WAYS)}")
        self._lock = threading.Lock()
        self._prompts: Prompts | None = None

    def _loaded(self) -> Prompts:
        with self._lock:
            if self._prompts is None:
                from upcall.daemon.prompting.methods import prompts

                settings = Settings(self._pin_time, self._prompt_time)
                self._prompts = prompts(self._ways, self._pinentry, settings, self._log)
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
