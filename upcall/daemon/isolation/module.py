"""Forwards a key module's calls to a child process that runs it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from upcall.core.errors import ModuleFailed, PeerError, Refused
from upcall.daemon.isolation.breaker import Breaker
from upcall.daemon.isolation.child import Child, Gone
from upcall.keymodule import API, KeyHandle, Secrets
from upcall.wire.isolation import (
    ANSWER,
    CLOSE,
    EXPORT,
    FAILED,
    OPEN,
    PUBLIC,
    REFUSED,
    STALE,
    UNWRAP,
    WATCHED,
    WRAP,
    ChildMessage,
    refused_of,
)

PATIENCE: Final = 10.0  # seconds, the time-out of calls outside of requests
CLOSING: Final = 1.0  # seconds, the time-out for closing a key
MEMORY: Final = 1 << 30  # bytes of private memory: a leak ends the child, not the machine


class Log(Protocol):
    """upcall.process.log.EventLog."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


def _silent(event: str, /, **fields: object) -> None:
    return None


class IsolatedModule:
    """A KeyModule that runs another one in a child process. Thread-safe. `spec`: that module's "package:attribute".

    `deadline()`: returns the deadline, in seconds of CLOCK_MONOTONIC, of the request that the calling thread handles;
    0 if it handles none. Calls that have no answer by then raise Refused("timed-out"). `memory`: see `Child`.
    """

    api = API

    def __init__(
        self,
        alias: str,
        spec: str,
        deadline: Callable[[], float] = lambda: 0.0,
        log: Log = _silent,
        memory: int = MEMORY,
    ) -> None:
        self.name = alias
        self._spec, self._memory, self._log = spec, memory, log
        self._deadline_of_request = deadline
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._handles: dict[Child, int] = {}  # open keys by child, including those being opened
        self._numbers = itertools.count(1)
        self._started = 0
        self._breaker = Breaker()
        self._broken: dict[str, Breaker] = {}  # by signature, for keys that made a child fail

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> KeyHandle:
        """Opens a key in the child, as `KeyModule.open`. Refused("module-off") while the circuit breaker is open."""
        deadline = self.deadline()
        self._admit(signature, deadline)
        number = next(self._numbers)
        try:
            child = self._take_child()
            try:
                asked = child.ask(OPEN, number, signature, secrets, deadline, signature, blob)
                powers = self.outcome(asked).code
            except BaseException:
                self.give_back(child, closed=False)
                raise
        except (Gone, OSError, RuntimeError) as error:  # RuntimeError: no more threads
            self._undecided(signature)
            raise Refused("module-broke") from error
        except PeerError as error:
            self._undecided(signature)
            raise ModuleFailed(str(error)) from error
        except BaseException:
            self._undecided(signature)
            raise
        kind = _PublicHandle if powers & PUBLIC else _Handle
        return kind(self, child, number, signature, secrets, bool(powers & WATCHED))

    def close(self) -> None:
        """Ends the child. Open keys become stale."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def report(self) -> dict[str, object]:
        """Returns entries for the daemon's status, as plain data."""
        with self._lock:
            child = self._child
            pid = None if child is None or child.gone else child.pid
            return {
                "module": self.name,
                "isolated": True,
                "pid": pid,
                "restarts": max(0, self._started - 1),
                "breaker": self._breaker.state(time.monotonic()),
            }

    def deadline(self) -> float:
        return self._deadline_of_request() or time.monotonic() + PATIENCE

    # --- children ------------------------------------------------------------------------------------------

    def _take_child(self) -> Child:
        """Returns the current child, started if necessary, and counts one more key in it."""
        with self._lock:
            child = self._child
            if child is None or child.lost():
                child = self._child = Child(self._spec, self._memory, self._on_failure)
                self._handles = {one: count for one, count in self._handles.items() if not one.gone}
                self._started += 1
                self._log("module-started", module=self.name, times=self._started)
            self._handles[child] = self._handles.get(child, 0) + 1
            return child

    def give_back(self, child: Child, closed: bool) -> None:
        """Releases a key. The child ends with its last key, so that no key material stays in memory."""
        with self._lock:
            self._handles[child] = left = self._handles.get(child, 1) - 1
            if left or not closed:
                return
            del self._handles[child]
            if self._child is child:
                self._child = None
        child.end()

    # --- failures ------------------------------------------------------------------------------------------

    def _admit(self, signature: str, deadline: float) -> None:
        """Waits until the module may be tried. Refused("module-off")."""
        with self._lock:
            now = time.monotonic()
            key = self._broken.get(signature)
            wait = 0.0 if key is None else key.admit(now, deadline)
            try:
                wait = max(wait, self._breaker.admit(now, deadline))
            except Refused:
                if key is not None:
                    key.undecided()
                raise
        if wait:
            time.sleep(wait)

    def _undecided(self, signature: str) -> None:
        with self._lock:
            self._breaker.undecided()
            if signature in self._broken:
                self._broken[signature].undecided()

    def _on_failure(self, why: str, keys: set[str]) -> None:
        with self._lock:
            now = time.monotonic()
            self._breaker.failed(now)
            for key in keys:
                self._broken.setdefault(key, Breaker()).failed(now)
            self._log("module-died", module=self.name, why=why, calls=len(keys), in_a_row=self._breaker.failures)

    def succeeded(self, signature: str) -> None:
        """Resets the circuit breaker of a key after a verb. Opening a key does not count as success."""
        if self._breaker.failures or self._broken:
            with self._lock:
                self._breaker.succeeded()
                self._broken.pop(signature, None)

    def outcome(self, outcome: ChildMessage) -> ChildMessage:
        """Returns an answer; raises the exception that another message stands for."""
        if outcome.kind == ANSWER:
            return outcome
        if outcome.kind == REFUSED:
            if outcome.text == "own-request":
                self._log("deadlock-refused", module=self.name, waiting="its process, for a file on eCryptfs")
            raise refused_of(outcome)
        if outcome.kind == FAILED:
            raise ModuleFailed(outcome.text)
        self._log("module-broke", module=self.name, why=outcome.text)
        raise Refused("module-broke")


class _Handle:
    """A KeyHandle of a key in a child."""

    def __init__(
        self, module: IsolatedModule, child: Child, number: int, signature: str, secrets: Secrets, watched: bool
    ) -> None:
        self._module, self._child, self._number = module, child, number
        self._signature, self._secrets, self._watched = signature, secrets, watched
        self._open = True

    def wrap(self, key: bytes, /) -> bytes:
        return bytes(self._verb(WRAP, key).data)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        return bytes(self._verb(UNWRAP, wrapped).data)

    def stale(self) -> bool:
        """Returns whether the key must be opened again: its source has changed, or the child has ended."""
        if self._child.lost():
            return True
        if not self._watched:
            return False
        try:
            return bool(self._module.outcome(self._ask(STALE, self._module.deadline())).code)
        except Gone:
            return True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            self._ask(CLOSE, time.monotonic() + CLOSING)
        except (Gone, Refused):
            pass  # the child's end has closed it
        finally:
            self._module.give_back(self._child, True)

    def _verb(self, kind: int, data: bytes = b"") -> ChildMessage:
        if not self._open:
            raise ModuleFailed("this key was closed")
        try:
            outcome = self._ask(kind, self._module.deadline(), data)
        except Gone:
            if not self._open:  # closed meanwhile, and the child ends with its last key
                raise ModuleFailed("the key was closed meanwhile") from None
            raise Refused("module-broke") from None
        except PeerError as error:
            raise ModuleFailed(str(error)) from error
        self._module.succeeded(self._signature)
        return self._module.outcome(outcome)

    def _ask(self, kind: int, deadline: float, data: bytes = b"") -> ChildMessage:
        return self._child.ask(kind, self._number, self._signature, self._secrets, deadline, "", data)


class _PublicHandle(_Handle):
    def export_public(self) -> bytes:
        return bytes(self._verb(EXPORT).data)
