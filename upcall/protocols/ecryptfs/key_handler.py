"""The handler of "ecryptfs" and "key": wraps and unwraps with the key that the user's keyring names.

The auth token is looked up by signature on every request, as libecryptfs does: a key that was unlinked stops
working at once. The opened key is kept, until its file or its auth token changes or it is locked.
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
    """A module with something to say in the status: one in a process of its own (upcall.daemon.isolation)."""

    def report(self) -> dict[str, object]: ...


class _Serving(threading.local):
    """What a thread is at work for."""

    asker: Asker | None = None
    asked = False  # it got a PIN, or tried to
    ahead = False  # the key is opened before anybody needs it: nobody is to be asked
    typed: bytearray | None = None  # a passphrase that is being tried


class _SecretsOf:
    """`keymodule.Secrets` for one key. Which request is being served is known by the thread that serves it."""

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
    """`modules`: what loads the key module of an alias. `fetch(signature, source)`: a passphrase kept elsewhere."""

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
        """The signature, as far as it takes to find the lane; `answer` looks at the whole packet. And the service:
        requests of "key" may wait for a person, and eCryptfs must not wait behind them."""
        body = envelope.body
        if len(body) < 2 + SIGNATURE_LENGTH or body[1] != SIGNATURE_LENGTH:
            return take_ask(body).signature  # says what is wrong with it
        return body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1") + envelope.service

    def answered_by(self, envelope: Envelope) -> str:
        """The key module's alias, once the key is open."""
        opened = self._opened.get(envelope.body[2 : 2 + SIGNATURE_LENGTH].decode("latin-1"))
        return "" if opened is None else opened.module

    def answer(self, envelope: Envelope) -> bytes:
        if envelope.requester.uid not in self._requesters:
            # The broker lets only this uid and root ask. Keys are not used for another one even if it says so.
            why = f"uid {envelope.requester.uid} asks for a key of uid {os.getuid()}"
            raise Refused("not-permitted", why=why)
        ask = take_ask(envelope.body)
        if ask.tag != TAG_64:
            take_file_key(ask.content)  # modules are promised its size, and nothing else could be unwrapped again
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
        """Puts a newly opened key in the place of what was there before, and closes what is not used."""
        with self._lock:
            there = self._opened.get(signature)
            locked = times != self._locks.times or self._locks.refuses(signature)  # while it was being opened
            beaten = there is not None and there is not before and there.token == new.token  # by another thread
            late = self._loaded.get(new.module) is not module  # it is no longer allowed, or another has its place
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
            raise Refused("no-key") from None  # it was revoked or unlinked a moment ago, or is not to be read
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
                if self._modules.get(alias) is load:  # it is still to be loaded, and thus
                    return self._loaded.setdefault(alias, loaded)  # another thread may have been faster

    def asker(self) -> Asker:
        """For what this thread is at work; without a request (keys are opened ahead), nobody can wait."""
        return self.serving.asker or Asker("", Requester(os.geteuid(), os.getpid()), 0.0)

    def passphrase(self, signature: str, source: str) -> bytearray:
        """What is kept in locked memory ("ask"), or elsewhere. One that is not there is asked for. Refused as
        `keymodule.Secrets`."""
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
        """Whether a passphrase opens the key; then it is kept. Refused if that cannot be known. In the prompt's
        thread: the requests that wait for it have no time to lose."""
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
            if signature not in self._passphrases:  # as a command of the user's may have left it meanwhile
                self._passphrases[signature] = LockedMemory(typed.copy())
        return True

    def warm(self, signatures: Iterable[str], ahead: bool = False) -> None:
        """Opens keys before they are asked for: importing a key module can cost a slow machine a kernel's patience.

        What cannot be opened now is refused when it is asked for, with its reason. `ahead`: nobody needs them yet, so
        nobody is asked for a PIN or a passphrase.
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
        """Keeps a passphrase (empty: there is none to keep) in locked memory; the key works from now on."""
        self.forget(signature)
        self.prompter.unlock()
        with self._lock:
            if passphrase:
                self._passphrases[signature] = LockedMemory(passphrase)
                self._used[signature] = now()
            self._locks.unlock(signature)

    def unlock_all(self, cause: str | None = None) -> None:
        """Ends the lock for this cause; None: every lock, as a person has said. What was forgotten stays so."""
        with self._lock:
            self._locks.unlock_all(cause)
        if cause is None:
            self.prompter.unlock()

    def lock(self, signature: str | None, cause: str = COMMAND) -> int:
        """Forgets one key, or all, and refuses it until it is unlocked; gives how many were known.

        Every PIN goes, too: which token a key is in is not known here, and a PIN is soon typed again. What is being
        opened meanwhile is not kept."""
        with self._lock:
            known = set(self._opened) | set(self._passphrases)
            if signature is not None:
                known &= {signature}
                self._locks.lock(signature)
            else:
                self._locks.lock_all(cause)
                if cause == COMMAND:
                    for one in known:
                        self._locks.lock(one)  # by its name, too, for those who look
            closed = [self._drop(one) for one in known]
        self.prompter.lock()  # behind the lock: who has got something by a prompt can keep it no more
        for opened in filter(None, closed):
            opened.close()
        return len(known)

    def expire(self) -> tuple[list[str], float | None]:
        """Forgets the keys that nobody has used for `lock_after` seconds: their signatures, and in how many seconds
        the next one may be due, if any can be. They are not refused: who needs one has it opened anew."""
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
        """Other modules from now on; those of the aliases in `same` stay as they are, with the keys that they have
        opened. Of the others the keys are closed; requests that have them in hand come to their end."""
        with self._lock:
            self._modules = {alias: self._modules[alias] if alias in same else modules[alias] for alias in modules}
            for alias in [alias for alias in self._loaded if alias not in same]:
                del self._loaded[alias]
            closed = [self._opened.pop(name) for name, one in [*self._opened.items()] if one.module not in same]
        for opened in closed:
            opened.close()

    def forget(self, signature: str) -> None:
        """Drops the opened key and its passphrase."""
        with self._lock:
            opened = self._drop(signature)
        if opened is not None:
            opened.close()

    def _drop(self, signature: str) -> Opened | None:
        """What is to be closed of it; the lock is held."""
        self._used.pop(signature, None)
        kept = self._passphrases.pop(signature, None)
        if kept is not None:
            kept.wipe()
        return self._opened.pop(signature, None)

    def status(self) -> list[dict[str, object]]:
        """The keys in use, and the modules in processes of their own, as plain data."""
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
        """For what all keys are refused, if anything: words for the status."""
        with self._lock:
            return self._locks.causes


def now() -> float:
    """Seconds, those counted in which the machine was asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
