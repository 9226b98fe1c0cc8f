"""Opens keys whose auth tokens are in the user keyring.

The auth token is looked up by signature on every request, as in libecryptfs: a key that was unlinked stops working at
once. An opened key is used until its file or auth token changes (or the cache closes it).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from upcall.core.errors import PeerError, Refused
from upcall.keymodule import Secrets
from upcall.protocols.ecryptfs.authtok import AuthTok, take_auth_tok
from upcall.protocols.ecryptfs.key_cache import KeyCache
from upcall.protocols.ecryptfs.key_modules import KeyModules
from upcall.protocols.ecryptfs.opened_key import REREAD, Opened


class Keyring(Protocol):
    """The user's keyring (upcall.kernel.keyring)."""

    def find(self, description: str, /) -> int | None: ...
    def read(self, serial: int, /) -> bytes: ...


class KeyOpener:
    """Thread-safe; has no lock of its own.

    `secrets_of(signature, times)`: what a module is given to open a key; `times`: `KeyCache.times_locked` before.
    `prove_all`: verify each wrapped key by unwrapping it.
    """

    def __init__(
        self,
        keyring: Keyring,
        modules: KeyModules,
        cache: KeyCache,
        secrets_of: Callable[[str, int], Secrets],
        prove_all: bool,
    ) -> None:
        self._keyring, self._modules, self._cache = keyring, modules, cache
        self._secrets_of, self._prove_all = secrets_of, prove_all

    def open(self, signature: str) -> Opened:
        """Returns an opened key: a cached one, or one that is opened now, which may take as long as the module takes.

        Refused: "no-key", "locked", "bad-token", "no-module"; else what the module raises, which may be anything."""
        serial = self._keyring.find(signature)
        if serial is None:
            self._cache.forget(signature)
            raise Refused("no-key")
        cached = self._cache.find(signature)
        if cached is not None and cached.serial == serial and self._still_good(cached, signature):
            return cached
        return self._open(serial, signature, cached)

    def _open(self, serial: int, signature: str, cached: Opened | None) -> Opened:
        times = self._cache.times_locked(signature)
        token = self._token(serial, signature)
        module = self._modules.get(token.alias)
        handle = module.open(signature, token.blob, self._secrets_of(signature, times))
        new = Opened(handle, token.alias, serial, token, self._prove_all)
        kept = self._cache.keep(signature, cached, new, module, times)
        return self.open(signature) if kept is None else kept

    def _still_good(self, opened: Opened, signature: str) -> bool:
        if opened.stale():
            return False
        now = time.monotonic()
        if now >= opened.reread:
            if self._token(opened.serial, signature) != opened.token:
                return False
            opened.reread = now + REREAD
        return True

    def _token(self, serial: int, signature: str) -> AuthTok:
        try:
            token = take_auth_tok(self._keyring.read(serial))
        except OSError:
            raise Refused("no-key") from None  # it was just revoked or unlinked, or is not readable
        except PeerError as error:
            raise Refused("bad-token", why=str(error)) from None
        if token.signature != signature:
            raise Refused("bad-token", why=f"it is the key {token.signature}'s")
        return token
