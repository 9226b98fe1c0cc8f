"""Remembers opened keys, passphrases and locks, by the signature of the key.

Locks of threads, and what each guards:

- `KeyCache._lock`: the opened keys, passphrases, locks and times of use. A change of several of them is one critical
  section: who locks a key closes it and wipes its passphrase in the same one. All these sections are in this file.
- `KeyModules._lock`: the loaders and loaded modules. It is taken last: `KeyCache.use` holds both.

Nothing foreign is called while one of them is held: no key module or its loader, keyring or prompter. A key is removed
from the cache under the lock, and closed after it. Requests with an open key take no lock: they read one dictionary
entry at a time, which CPython does atomically.

A key that takes long to open, and a passphrase that is being tried, are kept only if nothing has happened meanwhile
that forbids it: see `keep` and `keep_passphrase`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable

from upcall.core.errors import Refused
from upcall.daemon.secrets import Prompter
from upcall.keymodule import KeyModule
from upcall.protocols.ecryptfs.key_modules import KeyModules, Loaders
from upcall.protocols.ecryptfs.lock_cause import cause_in_words, since
from upcall.protocols.ecryptfs.locks import COMMAND, Locks
from upcall.protocols.ecryptfs.opened_key import Opened
from upcall.protocols.ecryptfs.passphrases import Passphrases


class KeyCache:
    """Thread-safe. `prompter` is told when keys are locked and unlocked."""

    def __init__(self, modules: KeyModules, prompter: Prompter) -> None:
        self._lock_after = 0.0
        self._modules, self._prompter = modules, prompter
        self._lock = threading.Lock()
        self._opened: dict[str, Opened] = {}
        self._passphrases = Passphrases()
        self._locks = Locks()
        self._used: dict[str, float] = {}  # signature -> when, by `now`; of what is open, or has a passphrase

    @property
    def lock_after(self) -> float:
        """Seconds without use after which a key is closed and its passphrase forgotten; 0: never. Uses are recorded
        only then; when it is set, all keys count as just used."""
        return self._lock_after

    @lock_after.setter
    def lock_after(self, seconds: float) -> None:
        with self._lock:
            if not self._lock_after:
                self._used = dict.fromkeys(self._used, now())
            self._lock_after = seconds

    # --- opened keys ---------------------------------------------------------------------------------------

    def find(self, signature: str) -> Opened | None:
        """Returns an opened key, unless it is overdue; then it is closed. Refused("locked"). Takes no lock."""
        if self._locks.refuses(signature):
            raise Refused("locked", why=self._why(signature))
        if self._lock_after and self._overdue(signature, now()):
            self.forget(signature)
        return self._opened.get(signature)

    def used(self, signature: str) -> None:
        """Records that a key has just been used, if that matters."""
        if self._lock_after:
            self._used[signature] = now()

    def opened_by(self, signature: str) -> str:
        """Returns the alias of the module that has opened the key; "" if it is not open."""
        opened = self._opened.get(signature)
        return "" if opened is None else opened.module

    def times_locked(self, signature: str) -> int:
        """Returns how often the key was locked, alone or with all. To be read before an opening, or the trial of a
        passphrase, whose result is handed to `keep` or `keep_passphrase`."""
        return self._locks.times(signature)

    def locked_since(self, signature: str, times: int) -> bool:
        """Returns whether the key is locked, or has been since `times` was read. Takes no lock.
        `lock` calls the prompter's afterwards, which withdraws a prompt that is opened on a "no" of this meanwhile."""
        return times != self._locks.times(signature) or self._locks.refuses(signature)

    def keep(self, signature: str, before: Opened | None, new: Opened, module: KeyModule, times: int) -> Opened | None:
        """Caches a newly opened key in place of `before`, which `find` returned. Returns the key to use: `new`, or the
        same key if another thread has opened it first; None if a reload has removed or replaced `module`, which opened
        it. Refused("locked"): it was locked while it was being opened. Closes the key that is not used.

        `times`: `times_locked` when the opening began."""
        with self._lock:
            there = self._opened.get(signature)
            locked = self.locked_since(signature, times)
            beaten = there is not None and there is not before and there.token == new.token
            late = not self._modules.has(new.module, module)
            if not locked and not beaten and not late:
                self._opened[signature] = new
                self._used[signature] = now()
        useless = new if locked or beaten or late else there
        if useless is not None:
            useless.close()
        if locked:
            raise Refused("locked", why=self._why(signature))
        if late:
            return None
        return there if beaten else new

    def forget(self, signature: str) -> None:
        """Closes the key and wipes its passphrase."""
        with self._lock:
            opened = self._drop(signature)
        _close([opened])

    def use(self, loaders: Loaders, same: Collection[str]) -> None:
        """Replaces the key modules, except those of the aliases in `same`, which keep their opened keys. Keys of the
        others are closed; calls that use them may fail."""
        with self._lock:
            self._modules.replace(loaders, same)
            closed = [self._opened.pop(name) for name, one in [*self._opened.items()] if one.module not in same]
        _close(closed)

    # --- passphrases ---------------------------------------------------------------------------------------

    def passphrase(self, signature: str) -> bytearray | None:
        """Returns a copy of a passphrase in locked memory, which the caller wipes; None if there is none."""
        with self._lock:
            return self._passphrases.get(signature)

    def keep_passphrase(self, signature: str, passphrase: bytearray, times: int) -> None:
        """Copies a passphrase that has opened the key to locked memory, unless a command has set one meanwhile.
        Refused("locked"): the key was locked meanwhile. `times`: `times_locked` when the passphrase was tried."""
        with self._lock:
            if self.locked_since(signature, times):
                raise Refused("locked", why=self._why(signature))
            if signature not in self._passphrases:
                self._passphrases.keep(signature, passphrase.copy())
                self._used[signature] = now()

    # --- locks: by the user's commands, events such as suspend, and time -----------------------------------

    def unlock(self, signature: str, passphrase: bytearray) -> bool:
        """Unlocks a key and moves its passphrase (empty: none) to locked memory. Returns whether it was locked."""
        self.forget(signature)
        self._prompter.unlock()
        with self._lock:
            if passphrase:
                self._passphrases.keep(signature, passphrase)
                self._used[signature] = now()
            was_locked = self._locks.refuses(signature)
            self._locks.unlock(signature)
        return was_locked

    def unlock_all(self, cause: str | None = None) -> bool:
        """Ends the lock for a cause; None: all locks, by a person's command. Wiped passphrases are not restored.
        Returns whether anything was locked."""
        with self._lock:
            were_locked = bool(self._locks.single or self._locks.causes)
            self._locks.unlock_all(cause)
        if cause is None:
            self._prompter.unlock()
        return were_locked

    def lock(self, signature: str | None, cause: str = COMMAND) -> int:
        """Closes one key, or all (None), wipes passphrases, and refuses requests until unlocked. Returns how many keys
        were open or had a passphrase.

        All PINs are wiped, too: which token holds a key is not known here. A key that another thread is opening is not
        cached."""
        with self._lock:
            known, at = {*self._opened, *self._passphrases}, time.time()
            if signature is not None:
                known &= {signature}
                self._locks.lock(signature, at)
            else:
                self._locks.lock_all(cause, at)
                if cause == COMMAND:
                    for one in known:
                        self._locks.lock(one, at)  # individually, too, so that the status lists it
            closed = [self._drop(one) for one in known]
        self._prompter.lock()  # after the lock is set: a prompt that ends now cannot keep its secret
        _close(closed)
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
        _close(closed)
        return due, min((used + self.lock_after - at for used in [*self._used.values()]), default=None)

    def status(self) -> list[dict[str, object]]:
        """Returns opened and locked keys, and the modules in processes of their own, as plain data."""
        modules = self._modules.reports()
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

    def locks(self) -> list[dict[str, object]]:
        """Returns all locks, with their causes and times (seconds since the epoch), as plain data."""
        with self._lock:
            return self._locks.report()

    def remembered(self) -> list[str]:
        """Returns the signatures of the keys whose passphrases are in memory, sorted."""
        with self._lock:
            return sorted(self._passphrases)

    def _why(self, signature: str) -> str:
        """Returns since when, and for which cause, a key is locked, for people. Takes no lock."""
        lock = self._locks.lock_of(signature)
        return "it was locked meanwhile" if lock is None else f"locked {since(lock[1])} ({cause_in_words(lock[0])})"

    # --- with the lock held, except for `_overdue` ---------------------------------------------------------

    def _overdue(self, signature: str, at: float) -> bool:
        return bool(self._lock_after) and at - self._used.get(signature, at) >= self._lock_after

    def _drop(self, signature: str) -> Opened | None:
        """Removes a key from the cache and wipes its passphrase. Returns the key, for the caller to close later."""
        self._used.pop(signature, None)
        self._passphrases.wipe(signature)
        return self._opened.pop(signature, None)


def _close(keys: Iterable[Opened | None]) -> None:
    for opened in keys:
        if opened is not None:
            opened.close()


def now() -> float:
    """Returns seconds of CLOCK_BOOTTIME, which includes time asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
