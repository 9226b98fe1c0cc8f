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
        """Waits for nothing. Not in a signal handler."""
        with self._lock:
            self._again = self._running
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="reload", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._work()
            finally:
                with self._lock:
                    self._running, self._again = self._again, False
            if not self._running:
                return
