"""Locks keys automatically: after a time without use, and on events of logind (upcall.process.logind).

One thread starts the process that listens to logind, applies what it reports, and restarts it if it ends. That process
dies with the thread (PR_SET_PDEATHSIG). The thread also looks for keys that have not been used for long.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from upcall.process import start_python as startpython
from upcall.process.log import EventLog
from upcall.process.logind import CAUSES, MAX_WORD
from upcall.protocols.ecryptfs.key_cache import KeyCache
from upcall.protocols.ecryptfs.settings import LockSettings

BUS: Final = Path("/run/dbus/system_bus_socket")
_RETRY_FIRST, _RETRY_MOST = 1.0, 300.0  # seconds between two tries to listen
_NO_BUS: Final = 60.0  # seconds until we look again whether there is a bus
_GOOD: Final = 60.0  # seconds after which one that ends was a good one: the next starts soon


class Locking:
    """Locks the keys of `keys` when its settings say so."""

    def __init__(
        self,
        keys: KeyCache,
        settings: LockSettings,
        log: EventLog,
        on_event: Callable[[bool, str], None] = lambda begins, cause: None,
    ) -> None:
        """Starts a thread if there is anything to lock for. `on_event(begins, cause)`: called after keys were locked
        for a cause, or after it has ended; in that thread."""
        self._on_event = on_event
        self._keys, self._log = keys, log
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._causes: tuple[str, ...] = ()
        self._wanted: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None
        self._child: _Child | None = None
        self._retry, self._retry_at = _RETRY_FIRST, 0.0
        self._why = ""  # not listening
        self.use(settings)

    def use(self, settings: LockSettings) -> None:
        """Replaces the settings. Unlocks what was locked for a cause that no longer counts. Does not block."""
        self._keys.lock_after = settings.after
        self._wanted = tuple(cause for cause in CAUSES if cause in settings.causes)
        if self._thread is None and (self._wanted or self._keys.lock_after):
            self._thread = threading.Thread(target=self._run, name="locking", daemon=True)
            self._thread.start()
        os.eventfd_write(self._wake, 1)

    def report(self) -> dict[str, object]:
        """Returns an entry of the daemon's status. `listening`: whether logind's events arrive; if not, `why`."""
        child = self._child
        listening = child is not None and child.heard
        return {
            "lock_after": self._keys.lock_after,
            "lock_on": list(self._wanted),
            "listening": listening,
            "why": "" if listening else self._why,
        }

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                self._once()
            except Exception as error:  # noqa: BLE001 - a thread that has ended locks nothing any more
                self._log("auto-lock-failed", error=type(error).__name__)
                time.sleep(_RETRY_FIRST)

    def _once(self) -> None:
        wait = min(self._expire(), self._see_to_child())
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._child is not None:
            poll.register(self._child.socket, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if wait == math.inf else math.ceil(wait * 1000))]
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._child is not None and self._child.socket.fileno() in ready:
            self._hear(self._child)

    def _expire(self) -> float:
        """Closes expired keys. Returns the seconds until the next call."""
        expired, due = self._keys.expire()
        for signature in expired:
            self._log("key-locked", key=signature, why="unused")
        if not self._keys.lock_after:
            return math.inf
        return max(0.0, self._keys.lock_after if due is None else due)

    def _see_to_child(self) -> float:
        """Starts, replaces or ends the listening process, as the settings require. Returns the seconds until the next
        call."""
        if self._causes != self._wanted:
            for cause in {*self._causes} - {*self._wanted}:
                self._keys.unlock_all(cause)
            self._causes, self._retry, self._retry_at = self._wanted, _RETRY_FIRST, 0.0
            if self._child is not None:
                self._child.end()
                self._child = None
        if self._child is not None or not self._causes:
            return math.inf
        now = time.monotonic()
        if now < self._retry_at:
            return self._retry_at - now
        if not os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") and not BUS.exists():
            self._not_listening(f"there is no {BUS}")
            self._retry_at = now + _NO_BUS
            return _NO_BUS
        self._retry_at, self._retry = now + self._retry, min(_RETRY_MOST, 2 * self._retry)
        try:
            held = self._keys.held()
            self._child = _Child([f"{cause}!" if cause in held else cause for cause in self._causes])
        except OSError as error:
            self._not_listening(f"the process that listens could not be started: {error.strerror}")
            return self._retry_at - now
        return math.inf

    def _hear(self, child: _Child) -> None:
        """Handles one message of the listening process, or its end."""
        word = child.word()
        if not word:
            status = child.end()
            self._child = None
            if time.monotonic() - child.started > _GOOD:
                self._retry = _RETRY_FIRST
                self._retry_at = time.monotonic() + self._retry
            self._not_listening(child.note or f"the process that listens has ended with status {status}")
            return
        verb, _, cause = word.partition(" ")
        if verb == "note":
            child.note = cause
            if child.heard:  # otherwise it is about to end, and its last word is why
                self._log("logind-warned", note=cause)
        elif verb in ("on", "off") and cause in self._causes:
            if not child.heard:
                child.heard, self._why = True, ""
                self._log("logind-listening", lock_on=",".join(self._causes))
            self._turn(verb == "on", cause)
            child.done(word)

    def _turn(self, on: bool, cause: str) -> None:
        if on:
            self._log("keys-locked", why=cause, forgotten=self._keys.lock(None, cause))
            self._on_event(True, cause)
        elif cause in self._keys.held():
            self._keys.unlock_all(cause)
            self._log("keys-unlocked", why=cause)
            self._on_event(False, cause)

    def _not_listening(self, why: str) -> None:
        if why != self._why:
            self._why = why
            self._log("logind-unavailable", why=why, missed=",".join(self._causes))


class _Child:
    """The listening process; in a process group of its own, so that a terminal's signals do not reach it. OSError."""

    def __init__(self, causes: Iterable[str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.started, self.heard, self.note = time.monotonic(), False, ""
        command = startpython.command("upcall.process.logind", str(os.getuid()), *causes)
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ]
        try:
            with theirs:  # subprocess would cost the daemon a megabyte
                self._pid = os.posix_spawn(
                    command[0], command, startpython.cleaned(), file_actions=actions, setpgroup=0
                )
        except OSError:
            self.socket.close()
            raise

    def word(self) -> str:
        """Returns its next message; "" at its end."""
        try:
            return self.socket.recv(MAX_WORD).decode("utf-8", "replace")
        except OSError:
            return ""

    def done(self, word: str) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(word.encode())

    def end(self) -> int:
        """Ends it, by SIGKILL if necessary. Returns its exit status; -1 if that is unknown (SIGCHLD is ignored)."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            if not _ends_soon(self._pid):
                os.kill(self._pid, signal.SIGKILL)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        except ChildProcessError:
            return -1


def _ends_soon(pid: int) -> bool:
    """Returns whether it exits within a second, now that one of the sockets is closed."""
    watch = os.pidfd_open(pid)
    try:
        return bool(select.select([watch], [], [], 1.0)[0])
    finally:
        os.close(watch)
