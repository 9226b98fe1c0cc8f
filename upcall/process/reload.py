"""Reloads the configuration on SIGHUP, in a thread of its own, while requests are served."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from upcall.kernel.process import has_terminal


class Hangup:
    """Handles SIGHUP: reloads the configuration, or ends the process if its terminal is gone. A signal that arrives
    before `connect` is handled then."""

    def __init__(self) -> None:
        """Installs the handler: from now on SIGHUP does not kill the process. In the main thread only."""
        self._terminal = has_terminal()
        self._actions: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._early = False
        signal.signal(signal.SIGHUP, self._on_signal)

    def connect(self, reload: Callable[[], None], stop: Callable[[], None]) -> None:
        """Sets what SIGHUP does. Both are called in the signal handler: they must not block."""
        self._actions = reload, stop
        if self._early:
            self._on_signal()

    def _on_signal(self, *_: object) -> None:
        if self._actions is None:
            self._early = True
            return
        reload, stop = self._actions
        if self._terminal and not has_terminal():
            stop()
        else:
            reload()


class Reloading:
    """Runs `work` in a thread of its own, one run at a time. Requests during a run are coalesced into one more run
    after it, so that no change is missed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._running = self._again = False

    def ask(self) -> None:
        """Requests a run. Does not block. Must not be called in a signal handler. RuntimeError if no thread can be
        started."""
        with self._lock:
            self._again = self._running
            if self._running:
                return
            self._running = True
        self._start()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, name="reload", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._running = self._again = False
            raise

    def _run(self) -> None:
        """Runs the work once. An unexpected exception goes to threading.excepthook and does not prevent later runs."""
        try:
            self._work()
        finally:
            with self._lock:  # after this, another thread may have begun a run
                again = self._running = self._again
                self._again = False
            if again:
                self._start()
