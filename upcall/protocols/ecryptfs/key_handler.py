"""Handles requests of "ecryptfs" and "key": wraps and unwraps with keys whose auth tokens are in the user keyring."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from upcall.core.errors import ModuleFailed, PeerError, Refused
from upcall.daemon.secrets import NoPrompter, Prompter
from upcall.handler import Waits
from upcall.protocols.ecryptfs.key_cache import KeyCache
from upcall.protocols.ecryptfs.key_modules import KeyModules, Loaders
from upcall.protocols.ecryptfs.key_opening import KeyOpener, Keyring
from upcall.protocols.ecryptfs.key_secrets import KeySecrets, Serving
from upcall.protocols.ecryptfs.opened_key import Opened
from upcall.protocols.ecryptfs.packets import (
    SIGNATURE_LENGTH,
    TAG_64,
    TAG_65,
    TAG_67,
    check_file_key,
    pack_success,
    take_ask,
)
from upcall.protocols.ecryptfs.self_deadlock import OwnWaits
from upcall.wire.envelope import Envelope


class KeyHandler:
    """Implements upcall.handler.Handler, with a cache of keys, which the user's commands lock. Thread-safe.

    `fetch(signature, source)`: returns a passphrase that is kept elsewhere than in this process. `prove_all`: verify
    each wrapped key by unwrapping it.
    """

    services: tuple[str, ...] = ("ecryptfs", "key")

    def __init__(
        self,
        keyring: Keyring,
        loaders: Loaders,
        fetch: Callable[[str, str], bytearray],
        prove_all: bool = False,
        prompter: Prompter | None = None,
    ) -> None:
        self.waits: Waits = OwnWaits[Any]()
        self._requesters = frozenset({0, os.getuid()})
        self._serving, self._prompter = Serving(), prompter or NoPrompter()
        modules = KeyModules(loaders)
        self.cache = KeyCache(modules, self._prompter)

        def secrets_of(signature: str, times: int) -> KeySecrets:
            return KeySecrets(signature, times, self._serving, self.cache, self._prompter, fetch, self.opener.open)

        self.opener = KeyOpener(keyring, modules, self.cache, secrets_of, prove_all)

    def lane(self, envelope: Envelope) -> str:
        """Returns signature and service. `answer` checks the whole packet. The service is included because requests of
        "key" may wait for a prompt, and those of eCryptfs must not wait for them."""
        body = envelope.body
        if len(body) < 2 + SIGNATURE_LENGTH or body[1] != SIGNATURE_LENGTH:
            return take_ask(body).signature  # raises PeerError
        return body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1") + envelope.service

    def kind(self, envelope: Envelope) -> int:
        """Returns the packet's tag: to unwrap can take ten times as long as to wrap."""
        return envelope.body[0]

    def answered_by(self, envelope: Envelope) -> str:
        """The key module's alias, once the key is open."""
        return self.cache.opened_by(envelope.body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1"))

    def answer(self, envelope: Envelope) -> bytes:
        if envelope.requester.uid not in self._requesters:
            # The broker admits only this uid and root. Do not trust it: no other uid may use the keys.
            why = f"uid {envelope.requester.uid} asks for a key of uid {os.getuid()}"
            raise Refused("not-permitted", why=why)
        tag, signature, content = take_ask(envelope.body)
        if tag != TAG_64:
            check_file_key(content)  # modules rely on its size; another format could not be unwrapped
        serving = self._serving
        serving.request = envelope
        try:
            opened = self.opener.open(signature)
            self.cache.used(signature)
            return pack_success(TAG_67, opened.wrap(content)) if tag != TAG_64 else _unwrapped(opened, content)
        finally:
            serving.request = None  # it holds a file key
            if serving.asked:
                serving.over(self._prompter)

    def deadline(self) -> float:
        """Returns the deadline of the request that this thread serves (s of CLOCK_MONOTONIC); 0.0 without one."""
        return self._serving.asker().deadline

    def warm(self, signatures: Iterable[str], ahead: bool = False) -> None:
        """Opens keys before they are needed: importing a key module can take longer than the kernel's time-out of 3 s.

        Failures are ignored: the request that needs the key is refused, with the reason. `ahead`: open no prompt for a
        PIN or passphrase.
        """
        self._serving.ahead = ahead
        try:
            for signature in signatures:
                with contextlib.suppress(BaseException):  # modules raise anything; a traceback could show a secret
                    self.opener.open(signature)
                self._serving.over(self._prompter)
        finally:
            self._serving.ahead = False


def _unwrapped(opened: Opened, wrapped: bytes) -> bytes:
    content = opened.unwrap(wrapped)
    try:
        check_file_key(content)
    except PeerError:
        raise ModuleFailed("what came out is no file key: another key wrapped it") from None
    return pack_success(TAG_65, content)
