"""Runs one source on a loop, in a process of its own: signals, the service manager, its watchdog, and the end."""

from __future__ import annotations

import signal

from upcall.kernel.notify import Manager
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.waker import Waker


class LoopProcess:
    """Serves until `stop`. A subclass makes its source with `loop` and `log`. `manager`: the service manager's
    notification socket. `ready`: what the service manager is told when `run` begins."""

    ready = ""

    def __init__(self, log: EventLog, manager: Manager | None) -> None:
        self.log = log
        self.manager = manager or Manager({})
        self.loop = Loop()
        self._stopping = False
        self._waker = Waker()
        self.loop.add(self._waker, self._waker.heard, URGENT)
        self._watchdog = self.loop.timer(self._alive)
        self._watchdog.at(self.manager.next_wake())

    def look(self) -> None:
        """Is called after each turn of the loop; may raise to end `run`."""

    def lives(self) -> bool:
        """Returns whether the watchdog may be fed: a source that has failed is restarted with its process."""
        return True

    def close_source(self) -> None:
        """Closes the source; the loop still exists."""
        raise NotImplementedError

    def stop(self, *_: object) -> None:
        """Makes `run` return soon. May be called from a signal handler or another thread."""
        self._stopping = True
        self._waker.wake()

    def heed_signals(self) -> None:
        """Makes SIGTERM, SIGINT and SIGHUP end `run`; a new process reads the configuration. Call it in the main
        thread."""
        self._waker.heed_signals(self.stop)
        signal.signal(signal.SIGHUP, self.stop)

    def run(self) -> None:
        """Serves until `stop`, then closes the source. Raises what `look` raises."""
        self.manager.ready(self.ready)
        try:
            while not self._stopping:
                self.loop.turn()
                self.look()
        finally:
            self._close()

    def _alive(self, now: float) -> None:
        self.manager.alive(now, self.lives)
        self._watchdog.at(self.manager.next_wake())

    def _close(self) -> None:
        self.manager.stopping()
        self.close_source()
        self.loop.remove(self._waker)
        self._waker.close()
        self.loop.close()
        self.log("source-closed")
        self.log.flush()
