"""SIGHUP: the configuration is read again, by a thread of its own, while requests are served."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from upcall.kernel.process import has_terminal


class Hangup:
    """What SIGHUP means to this process: to read its configuration again; or to end, if the terminal in which it was
    started is gone. One that comes before `connect` is kept until then."""

    def __init__(self) -> None:
        """From here on it ends nothing. In the main thread."""
        self._terminal = has_terminal()
        self._actions: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._early = False
        signal.signal(signal.SIGHUP, self._on_signal)

    def connect(self, reload: Callable[[], None], stop: Callable[[], None]) -> None:
        """Both are called as signal handlers are."""
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
    """Does `work` in a thread of its own, once at a time; asked meanwhile, once more afterwards: what has changed
    since it began must not be missed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._running = self._again = False

    def ask(self) -> None:
        """Waits for nothing. Not in a signal handler. RuntimeError if there can be no thread now."""
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
        """Once. An unexpected error goes to threading.excepthook, and stops none of the reloads after it."""
        try:
            self._work()
        finally:
            with self._lock:  # from here on this thread does nothing more to what another may have begun
                again = self._running = self._again
                self._again = False
            if again:
                self._start()
