"""Handles requests of "ecryptfs" and "key": wraps and unwraps with keys whose auth tokens are in the user keyring.

The auth token is looked up by signature on every request, as in libecryptfs: a key that was unlinked stops working at
once. Opened keys are cached until their file or auth token changes, they are locked, or unused for `lock_after`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from upcall.core.errors import ModuleFailed, PeerError, Refused
from upcall.core.messages import Requester
from upcall.daemon.secrets import Asker as Asker
from upcall.daemon.secrets import NoPrompter, Prompter
from upcall.handler import Waits
from upcall.kernel.process import LockedMemory
from upcall.keymodule import KeyModule
from upcall.protocols.ecryptfs.authtok import AuthTok, take_auth_tok
from upcall.protocols.ecryptfs.locks import COMMAND, Locks
from upcall.protocols.ecryptfs.opened_key import REREAD, Opened
from upcall.protocols.ecryptfs.packets import (
    SIGNATURE_LENGTH,
    STATUS_OK,
    TAG_64,
    TAG_65,
    TAG_67,
    Ask,
    Reply,
    pack_reply,
    take_ask,
    take_file_key,
)
from upcall.protocols.ecryptfs.self_deadlock import OwnWaits
from upcall.wire.envelope import Envelope


class Keyring(Protocol):
    """The user's keyring (upcall.kernel.keyring)."""

    def find(self, description: str, /) -> int | None: ...
    def read(self, serial: int, /) -> bytes: ...


@runtime_checkable
class Reporting(Protocol):
    """A module that reports its status: one in a process of its own (upcall.daemon.isolation)."""

    def report(self) -> dict[str, object]: ...


class _Serving(threading.local):
    """The request that each thread serves."""

    asker: Asker | None = None
    asked = False  # it has asked for a PIN
    ahead = False  # the key is opened before it is needed: no prompts
    typed: bytearray | None = None  # a passphrase that is being tried


class _SecretsOf:
    """Implements `keymodule.Secrets` for one key. The current request is found by thread."""

    def __init__(self, service: KeyService, signature: str) -> None:
        self._service, self._signature = service, signature

    def passphrase(self, source: str, /) -> bytearray:
        return self._service.passphrase(self._signature, source)

    def pin(self, token: str, prompt: str, /) -> bytearray:
        if self._service.serving.ahead:
            raise Refused("locked")
        self._service.serving.asked = True
        return self._service.prompter.pin(token, prompt, self._service.asker())

    def verdict(self, token: str, good: bool, /) -> None:
        self._service.prompter.verdict(token, good)

    def touch(self, token: str, prompt: str, /) -> None:
        self._service.prompter.touch(token, prompt, self._service.asker())


class KeyService:
    """Implements upcall.handler.Handler; caches keys, passphrases and locks. Thread-safe.

    `modules`: alias -> loads its key module. `fetch(signature, source)`: returns a passphrase that is kept elsewhere
    than in this process. `prove_all`: verify each wrapped key by unwrapping it.
    """

    services: tuple[str, ...] = ("ecryptfs", "key")

    def __init__(
        self,
        keyring: Keyring,
        modules: Mapping[str, Callable[[], KeyModule]],
        fetch: Callable[[str, str], bytearray],
        prove_all: bool = False,
        prompter: Prompter | None = None,
    ) -> None:
        self.waits: Waits = OwnWaits[Any]()
        self.prompter: Prompter = prompter or NoPrompter()
        self.serving = _Serving()
        self._keyring, self._modules, self._fetch = keyring, modules, fetch
        self._prove_all = prove_all
        self._requesters = frozenset({0, os.getuid()})
        self._lock = threading.Lock()
        self._loaded: dict[str, KeyModule] = {}
        self._opened: dict[str, Opened] = {}
        self._passphrases: dict[str, LockedMemory] = {}
        self._locks = Locks()
        self.lock_after = 0.0  # seconds without use after which a key is closed and its passphrase forgotten; 0: never
        self._used: dict[str, float] = {}  # signature -> when, by `now`; of what is open, or has a passphrase

    # --- the handler ---------------------------------------------------------------------------------------

    def lane(self, envelope: Envelope) -> str:
        """Returns signature and service. `answer` checks the whole packet. The service is included because requests of
        "key" may wait for a prompt, and those of eCryptfs must not wait for them."""
        body = envelope.body
        if len(body) < 2 + SIGNATURE_LENGTH or body[1] != SIGNATURE_LENGTH:
            return take_ask(body).signature  # raises PeerError
        return body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1") + envelope.service

    def answered_by(self, envelope: Envelope) -> str:
        """The key module's alias, once the key is open."""
        opened = self._opened.get(envelope.body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1"))
        return "" if opened is None else opened.module

    def answer(self, envelope: Envelope) -> bytes:
        if envelope.requester.uid not in self._requesters:
            # The broker admits only this uid and root. Do not trust it: no other uid may use the keys.
            why = f"uid {envelope.requester.uid} asks for a key of uid {os.getuid()}"
            raise Refused("not-permitted", why=why)
        ask = take_ask(envelope.body)
        if ask.tag != TAG_64:
            take_file_key(ask.content)  # modules rely on its size; another format could not be unwrapped
        self.serving.asker = Asker(envelope.service, envelope.requester, envelope.deadline_ns / 1e9)
        try:
            return self._answer(ask)
        finally:
            self._over()

    def _answer(self, ask: Ask) -> bytes:
        opened = self._open(ask.signature)
        self._used[ask.signature] = now()
        if ask.tag != TAG_64:
            return pack_reply(Reply(TAG_67, STATUS_OK, opened.wrap(ask.content)))
        content = opened.unwrap(ask.content)
        try:
            take_file_key(content)
        except PeerError:
            raise ModuleFailed("what came out is no file key: another key wrapped it") from None
        return pack_reply(Reply(TAG_65, STATUS_OK, content))

    def _over(self) -> None:
        if self.serving.asked:
            self.serving.asked = False
            self.prompter.over()

    # --- keys ----------------------------------------------------------------------------------------------

    def _open(self, signature: str) -> Opened:
        serial = self._keyring.find(signature)
        if serial is None:
            self.forget(signature)
            raise Refused("no-key")
        times = self._locks.times
        if self._locks.refuses(signature):
            raise Refused("locked")
        if self._overdue(signature, now()):
            self.forget(signature)
        opened = self._opened.get(signature)
        if opened is not None and opened.serial == serial and self._still_good(opened, signature):
            return opened
        token = self._token(serial, signature)
        module = self._module(token.alias)
        handle = module.open(signature, token.blob, _SecretsOf(self, signature))
        new = Opened(handle, token.alias, serial, token, self._prove_all)
        return self._keep(signature, opened, new, module, times)

    def _keep(self, signature: str, before: Opened | None, new: Opened, module: KeyModule, times: int) -> Opened:
        """Caches a newly opened key in place of `before`, and closes the one that is not used. `times`: Locks.times
        when the opening began."""
        with self._lock:
            there = self._opened.get(signature)
            locked = times != self._locks.times or self._locks.refuses(signature)  # while it was being opened
            beaten = there is not None and there is not before and there.token == new.token  # by another thread
            late = self._loaded.get(new.module) is not module  # a reload removed or replaced the module
            if not locked and not beaten and not late:
                self._opened[signature] = new
                self._used[signature] = now()
        useless = new if locked or beaten or late else there
        if useless is not None:
            useless.close()
        if locked:
            raise Refused("locked")
        if late:
            return self._open(signature)
        return there if beaten and there is not None else new

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
        except PeerError:
            raise Refused("bad-token") from None
        if token.signature != signature:
            raise Refused("bad-token")
        return token

    def _module(self, alias: str) -> KeyModule:
        while True:
            with self._lock:
                module, load = self._loaded.get(alias), self._modules.get(alias)
            if module is not None:
                return module
            if load is None:
                raise Refused("no-module")
            loaded = load()
            with self._lock:
                if self._modules.get(alias) is load:  # no reload has replaced it meanwhile
                    return self._loaded.setdefault(alias, loaded)  # another thread may have loaded it

    def asker(self) -> Asker:
        """Returns the request that this thread serves; without one (keys opened ahead), one with deadline 0."""
        return self.serving.asker or Asker("", Requester(os.geteuid(), os.getpid()), 0.0)

    def passphrase(self, signature: str, source: str) -> bytearray:
        """Returns the passphrase from locked memory (`source` "ask") or elsewhere; prompts for one that is not in
        memory. Refused as in `keymodule.Secrets`."""
        if source != "ask":
            return self._fetch(signature, source)
        if self.serving.typed is not None:
            return self.serving.typed.copy()
        kept = self._kept(signature)
        if kept is not None:
            return kept
        if self.serving.ahead:
            raise Refused("locked")
        return self.prompter.passphrase(
            signature, self.asker(), lambda: self._kept(signature), lambda typed: self._try(signature, typed)
        )

    def _kept(self, signature: str) -> bytearray | None:
        with self._lock:
            kept = self._passphrases.get(signature)
            return None if kept is None else kept.copy()

    def _try(self, signature: str, typed: bytearray) -> bool:
        """Opens the key with a typed passphrase and keeps it in locked memory. False if it is wrong; Refused if that
        cannot be determined. Runs in the prompt's thread, so that waiting requests do not lose time."""
        times, self.serving.typed = self._locks.times, typed
        try:
            self._open(signature)
        except ModuleFailed:
            return False
        except Refused:
            raise
        except BaseException:  # noqa: BLE001 - modules raise anything, and its text could hold the passphrase
            raise Refused("module-broke") from None
        finally:
            self.serving.typed = None
            self._over()
        with self._lock:
            if times != self._locks.times or self._locks.refuses(signature):
                raise Refused("locked")
            if signature not in self._passphrases:  # a command may have set one meanwhile
                self._passphrases[signature] = LockedMemory(typed.copy())
        return True

    def warm(self, signatures: Iterable[str], ahead: bool = False) -> None:
        """Opens keys before they are needed: importing a key module can take longer than the kernel's time-out of 3 s.

        Failures are ignored: the request that needs the key is refused, with the reason. `ahead`: open no prompt for a
        PIN or passphrase.
        """
        self.serving.ahead = ahead
        try:
            for signature in signatures:
                with contextlib.suppress(BaseException):  # modules raise anything; a traceback could show a secret
                    self._open(signature)
                self._over()
        finally:
            self.serving.ahead = False

    # --- what the user's commands do -----------------------------------------------------------------------

    def unlock(self, signature: str, passphrase: bytearray) -> None:
        """Unlocks a key and moves its passphrase (empty: none) to locked memory."""
        self.forget(signature)
        self.prompter.unlock()
        with self._lock:
            if passphrase:
                self._passphrases[signature] = LockedMemory(passphrase)
                self._used[signature] = now()
            self._locks.unlock(signature)

    def unlock_all(self, cause: str | None = None) -> None:
        """Ends the lock for a cause; None: all locks, by a person's command. Wiped passphrases are not restored."""
        with self._lock:
            self._locks.unlock_all(cause)
        if cause is None:
            self.prompter.unlock()

    def lock(self, signature: str | None, cause: str = COMMAND) -> int:
        """Closes one key, or all (None), wipes passphrases, and refuses requests until unlocked. Returns how many keys
        were open or had a passphrase.

        All PINs are wiped, too: which token holds a key is not known here. A key that another thread is opening is not
        cached."""
        with self._lock:
            known = set(self._opened) | set(self._passphrases)
            if signature is not None:
                known &= {signature}
                self._locks.lock(signature)
            else:
                self._locks.lock_all(cause)
                if cause == COMMAND:
                    for one in known:
                        self._locks.lock(one)  # individually, too, so that the status lists it
            closed = [self._drop(one) for one in known]
        self.prompter.lock()  # after the lock is set: a prompt that ends now cannot keep its secret
        for opened in filter(None, closed):
            opened.close()
        return len(known)

    def expire(self) -> tuple[list[str], float | None]:
        """Closes keys unused for `lock_after` seconds and wipes their passphrases. Returns their signatures, and in
        how many seconds the next one may be due (None: never). They are not locked: a request opens them again."""
        if not self.lock_after:
            return [], None
        at = now()
        with self._lock:
            due = [signature for signature in [*self._used] if self._overdue(signature, at)]
            closed = [self._drop(signature) for signature in due]
        for opened in filter(None, closed):
            opened.close()
        return due, min((used + self.lock_after - at for used in [*self._used.values()]), default=None)

    def _overdue(self, signature: str, at: float) -> bool:
        return bool(self.lock_after) and at - self._used.get(signature, at) >= self.lock_after

    def use(self, modules: Mapping[str, Callable[[], KeyModule]], same: Collection[str]) -> None:
        """Replaces the modules, except those of the aliases in `same`, which keep their opened keys. Keys of the
        others are closed; calls that use them may fail."""
        with self._lock:
            self._modules = {alias: self._modules[alias] if alias in same else modules[alias] for alias in modules}
            for alias in [alias for alias in self._loaded if alias not in same]:
                del self._loaded[alias]
            closed = [self._opened.pop(name) for name, one in [*self._opened.items()] if one.module not in same]
        for opened in closed:
            opened.close()

    def forget(self, signature: str) -> None:
        """Closes the key and wipes its passphrase."""
        with self._lock:
            opened = self._drop(signature)
        if opened is not None:
            opened.close()

    def _drop(self, signature: str) -> Opened | None:
        """Removes a key from the cache and wipes its passphrase. Returns the key, for the caller to close after it has
        released the lock, which it must hold."""
        self._used.pop(signature, None)
        kept = self._passphrases.pop(signature, None)
        if kept is not None:
            kept.wipe()
        return self._opened.pop(signature, None)

    def status(self) -> list[dict[str, object]]:
        """Returns opened and locked keys, and the modules in processes of their own, as plain data."""
        modules = [module.report() for module in list(self._loaded.values()) if isinstance(module, Reporting)]
        with self._lock:
            return (
                modules
                + [
                    {"signature": signature, "module": opened.module, "open": True}
                    for signature, opened in self._opened.items()
                ]
                + [{"signature": signature, "locked": True} for signature in self._locks.single]
            )

    def held(self) -> list[str]:
        """Returns the causes for which all keys are locked."""
        with self._lock:
            return self._locks.causes


def now() -> float:
    """Returns seconds of CLOCK_BOOTTIME, which includes time asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
