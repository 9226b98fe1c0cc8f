"""The handler of "ecryptfs" and "key": wraps and unwraps with the key that the user's keyring names.

The auth token is looked up by signature on every request, as libecryptfs does: a key that was unlinked stops
working at once. The opened key is kept, until its file or its auth token changes or it is locked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from upcall.errors import ModuleFailed, PeerError, Refused
from upcall.kernel.process import LockedMemory
from upcall.keymodule import MAX_KEY, MAX_WRAPPED, Closable, KeyHandle, KeyModule, Watched
from upcall.messages import Requester
from upcall.wire.authtok import AuthTok, take_auth_tok
from upcall.wire.ecryptfs import (
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
from upcall.wire.netlink import Envelope

PATIENT = 5.0  # seconds that a request must have left to wait for a person
_REREAD = 1.0  # seconds after which an auth token that was replaced in its place is noticed


class Keyring(Protocol):
    """The user's keyring (upcall.kernel.keyring)."""

    def find(self, description: str, /) -> int | None: ...
    def read(self, serial: int, /) -> bytes: ...


class Prompter(Protocol):
    """Whom a module may have a person asked by. See `keymodule.Secrets`, which this serves."""

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray: ...
    def verdict(self, token: str, good: bool, /) -> None: ...
    def touch(self, token: str, prompt: str, asker: Asker, /) -> None: ...
    def over(self) -> None:
        """The calling thread is done with its request: a verdict that has not come comes no more."""

    def lock(self) -> None:
        """Forgets every PIN."""

    def unlock(self) -> None:
        """A person is there: they may be asked again, whatever was wrong before."""

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        """Takes over a connection of `upcall prompt`, which is to be sent `welcome`, or Refused. Never waits."""


@runtime_checkable
class Reporting(Protocol):
    """A module with something to say in the status: one in a process of its own (upcall.isolation)."""

    def report(self) -> dict[str, object]: ...


class Asker(NamedTuple):
    """The request for which a person is to be asked: who made it, and until when it can wait (monotonic)."""

    service: str
    requester: Requester
    deadline: float

    def patient(self) -> bool:
        """Whether it can wait for a person. eCryptfs never can."""
        return self.deadline - time.monotonic() >= PATIENT


class NoPrompter:
    """Where nobody can be asked."""

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray:
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


class _Serving(threading.local):
    """What a thread is at work for."""

    asker: Asker | None = None
    asked = False  # it got a PIN, or tried to


class _SecretsOf:
    """`keymodule.Secrets` for one key. Which request is being served is known by the thread that serves it."""

    def __init__(self, service: KeyService, signature: str) -> None:
        self._service, self._signature = service, signature

    def passphrase(self, source: str, /) -> bytearray:
        return self._service.passphrase(self._signature, source)

    def pin(self, token: str, prompt: str, /) -> bytearray:
        self._service.serving.asked = True
        return self._service.prompter.pin(token, prompt, self._service.asker())

    def verdict(self, token: str, good: bool, /) -> None:
        self._service.prompter.verdict(token, good)

    def touch(self, token: str, prompt: str, /) -> None:
        self._service.prompter.touch(token, prompt, self._service.asker())


class _Opened:
    """A key in use. What it wraps is proved by unwrapping it, the first time for each size."""

    __slots__ = ("_handle", "_prove_all", "_proved", "_watched", "module", "reread", "serial", "token")

    def __init__(self, handle: KeyHandle, module: str, serial: int, token: AuthTok, prove_all: bool) -> None:
        self._handle, self.module, self.serial, self.token = handle, module, serial, token
        self._watched = handle if isinstance(handle, Watched) else None
        self._prove_all = prove_all
        self._proved: dict[int, int] = {}  # size of a clear key -> size of its wrapped form
        self.reread = time.monotonic() + _REREAD

    def stale(self) -> bool:
        return self._watched is not None and self._watched.stale()

    def close(self) -> None:
        """Lets go of what the handle holds; a module that fails at that has nothing more to say."""
        if isinstance(self._handle, Closable):
            with contextlib.suppress(Exception):
                self._handle.close()

    def unwrap(self, wrapped: bytes) -> bytes:
        key = self._handle.unwrap(wrapped)
        if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY:
            raise Refused("module-broke")
        return key

    def wrap(self, key: bytes) -> bytes:
        """A wrapped key that can be unwrapped: the kernel would believe anything, and lose the file."""
        wrapped = self._handle.wrap(key)
        if not isinstance(wrapped, bytes) or not len(key) <= len(wrapped) <= MAX_WRAPPED:
            raise Refused("module-broke")
        if self._prove_all or self._proved.get(len(key)) != len(wrapped):
            if self.unwrap(wrapped) != key:
                raise Refused("module-broke")
            self._proved[len(key)] = len(wrapped)
        return wrapped


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
        self.prompter: Prompter = prompter or NoPrompter()
        self.serving = _Serving()
        self._keyring, self._modules, self._fetch = keyring, modules, fetch
        self._prove_all = prove_all
        self._lock = threading.Lock()
        self._loaded: dict[str, KeyModule] = {}
        self._opened: dict[str, _Opened] = {}
        self._passphrases: dict[str, LockedMemory] = {}
        self._locked: set[str] = set()

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

    def _open(self, signature: str) -> _Opened:
        serial = self._keyring.find(signature)
        if serial is None:
            self.forget(signature)
            raise Refused("no-key")
        if signature in self._locked:
            raise Refused("locked")
        opened = self._opened.get(signature)
        if opened is not None and opened.serial == serial and self._still_good(opened, signature):
            return opened
        token = self._token(serial, signature)
        module = self._module(token.alias)
        handle = module.open(signature, token.blob, _SecretsOf(self, signature))
        new = _Opened(handle, token.alias, serial, token, self._prove_all)
        return self._keep(signature, opened, new, module)

    def _keep(self, signature: str, before: _Opened | None, new: _Opened, module: KeyModule) -> _Opened:
        """Puts a newly opened key in the place of what was there before, and closes what is not used."""
        with self._lock:
            there = self._opened.get(signature)
            locked = signature in self._locked  # while it was being opened
            beaten = there is not None and there is not before and there.token == new.token  # by another thread
            late = self._loaded.get(new.module) is not module  # it is no longer allowed, or another has its place
            if not locked and not beaten and not late:
                self._opened[signature] = new
        useless = new if locked or beaten or late else there
        if useless is not None:
            useless.close()
        if locked:
            raise Refused("locked")
        if late:
            return self._open(signature)
        return there if beaten and there is not None else new

    def _still_good(self, opened: _Opened, signature: str) -> bool:
        if opened.stale():
            return False
        now = time.monotonic()
        if now >= opened.reread:
            if self._token(opened.serial, signature) != opened.token:
                return False
            opened.reread = now + _REREAD
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
        """What is kept in locked memory ("ask"), or elsewhere. Refused("locked")."""
        if source != "ask":
            return self._fetch(signature, source)
        with self._lock:
            kept = self._passphrases.get(signature)
            if kept is None:
                raise Refused("locked")
            return kept.copy()

    def warm(self, signatures: Iterable[str]) -> None:
        """Opens keys before they are asked for: importing a key module can cost a slow machine a kernel's patience.

        What cannot be opened now is refused when it is asked for, with its reason.
        """
        for signature in signatures:
            with contextlib.suppress(BaseException):  # modules raise anything; a traceback could show a secret
                self._open(signature)
            self._over()

    # --- what the user's commands do -----------------------------------------------------------------------

    def unlock(self, signature: str, passphrase: bytearray) -> None:
        """Keeps a passphrase (empty: there is none to keep) in locked memory; the key works from now on."""
        self.forget(signature)
        self.prompter.unlock()
        with self._lock:
            if passphrase:
                self._passphrases[signature] = LockedMemory(passphrase)
            self._locked.discard(signature)

    def lock(self, signature: str | None) -> int:
        """Forgets one key, or all, and refuses it until it is unlocked; gives how many were known.

        Every PIN goes, too: which token a key is in is not known here, and a PIN is soon typed again."""
        with self._lock:
            known = set(self._opened) | set(self._passphrases)
        self.prompter.lock()
        for one in known if signature is None else {signature}:
            with self._lock:
                self._locked.add(one)
            self.forget(one)
        return len(known if signature is None else known & {signature})

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
            opened = self._opened.pop(signature, None)
            kept = self._passphrases.pop(signature, None)
            if kept is not None:
                kept.wipe()
        if opened is not None:
            opened.close()

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
                + [{"signature": signature, "locked": True} for signature in sorted(self._locked)]
            )
