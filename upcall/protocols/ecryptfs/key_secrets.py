"""Gives key modules their secrets, on behalf of the request that the calling thread serves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from upcall.core.errors import ModuleFailed, Refused
from upcall.core.messages import Requester
from upcall.daemon.secrets import Asker, Prompter
from upcall.protocols.ecryptfs.key_cache import KeyCache
from upcall.wire.envelope import Envelope


class Serving(threading.local):
    """The request that each thread serves."""

    request: Envelope | None = None
    asked = False  # it has asked for a PIN
    ahead = False  # the key is opened before it is needed: no prompts
    typed: bytearray | None = None  # a passphrase that is being tried

    def asker(self) -> Asker:
        """Returns the request that this thread serves; without one (keys opened ahead), one with deadline 0."""
        request = self.request
        if request is None:
            return Asker("", Requester(os.geteuid(), os.getpid()), 0.0)
        return Asker(request.service, request.requester, request.deadline_ns / 1e9)

    def over(self, prompter: Prompter) -> None:
        """Ends this thread's request for the prompter, if it has asked for a PIN."""
        if self.asked:
            self.asked = False
            prompter.over()


class KeySecrets:
    """Implements `keymodule.Secrets` for one key. Thread-safe; refused as said there.

    `times`: `KeyCache.times_locked` before the key's opening began. If the key is locked after that, nothing more is
    asked for or given: Refused("locked").

    `fetch(signature, source)`: returns a passphrase that is kept elsewhere than in this process.
    `open_key(signature)`: opens the key, with `serving.typed` for its passphrase.
    """

    def __init__(
        self,
        signature: str,
        times: int,
        serving: Serving,
        cache: KeyCache,
        prompter: Prompter,
        fetch: Callable[[str, str], bytearray],
        open_key: Callable[[str], object],
    ) -> None:
        self._signature, self._times, self._serving, self._cache = signature, times, serving, cache
        self._prompter, self._fetch, self._open_key = prompter, fetch, open_key

    def passphrase(self, source: str, /) -> bytearray:
        """Returns the passphrase from locked memory (`source` "ask") or elsewhere; prompts for one that is not in
        memory."""
        if source != "ask":
            return self._fetch(self._signature, source)
        if self._serving.typed is not None:
            return self._serving.typed.copy()
        kept = self._kept()
        if kept is not None:
            return kept
        if self._serving.ahead:
            raise Refused("locked")
        return self._prompter.passphrase(self._signature, self._asker(), self._kept, self._try)

    def pin(self, token: str, prompt: str, /) -> bytearray:
        if self._serving.ahead:
            raise Refused("locked")
        self._serving.asked = True
        return self._prompter.pin(token, prompt, self._asker())

    def verdict(self, token: str, good: bool, /) -> None:
        self._prompter.verdict(token, good)

    def touch(self, token: str, prompt: str, /) -> None:
        if not self._locked():
            self._prompter.touch(token, prompt, self._asker())

    def _asker(self) -> Asker:
        return self._serving.asker()._replace(locked=self._locked)

    def _locked(self) -> bool:
        return self._cache.locked_since(self._signature, self._times)

    def _kept(self) -> bytearray | None:
        """Called by the prompter under its own lock, before it opens a prompt, too."""
        if self._locked():
            raise Refused("locked", why="it was locked meanwhile")
        return self._cache.passphrase(self._signature)

    def _try(self, typed: bytearray) -> bool:
        """Opens the key with a typed passphrase and keeps it in locked memory. False if it is wrong; Refused if that
        cannot be determined. Runs in the prompt's thread, so that waiting requests do not lose time."""
        times, self._serving.typed = self._cache.times_locked(self._signature), typed
        try:
            self._open_key(self._signature)
        except ModuleFailed:
            return False
        except Refused:
            raise
        except BaseException:  # noqa: BLE001 - modules raise anything, and its text could hold the passphrase
            raise Refused("module-broke") from None
        finally:
            self._serving.typed = None
            self._serving.over(self._prompter)
        self._cache.keep_passphrase(self._signature, typed, times)
        return True
