"""Runs the quota source as a process: one loop with the kernel's socket and the broker's, and the worker's thread."""

from __future__ import annotations

import gc
import signal
from collections.abc import Sequence

from upcall import config
from upcall.core.errors import UsageError
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, prefer_us, raise_descriptor_limit
from upcall.process.hardening import of_quota_source
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.paths import SYSTEM_FOLDER, Place, own_place
from upcall.process.trust import Fault, log_faults
from upcall.process.waker import Waker
from upcall.protocols.quota.settings import SourceSettings
from upcall.protocols.quota.setup import configured
from upcall.protocols.quota.source import QuotaSetup, QuotaSource, with_room_kept


class SourceProcess:
    """Runs a quota source until `stop`. `manager`: the service manager's notification socket."""

    def __init__(
        self, place: Place, setup: QuotaSetup, manager: Manager | None = None, log: EventLog | None = None
    ) -> None:
        self.log = log or EventLog("upcall-quota")
        self.manager = manager or Manager({})
        self._loop = Loop()
        self._stopping = False
        self._waker = Waker()
        self._loop.add(self._waker, self._waker.heard, URGENT)
        self._watchdog = self._loop.timer(self._alive)
        self._watchdog.at(self.manager.next_wake())
        self.source = QuotaSource(self._loop, place, self.log, setup)

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
        """Serves until `stop`, then delivers pending notices and writes the state. UsageError if the broker has
        another quota source, which would send everything twice."""
        self.manager.ready("listening to the kernel's quota warnings")
        try:
            while not self._stopping:
                self._loop.turn()
                if self.source.superfluous:
                    raise UsageError("the broker has a quota source already")
        finally:
            self._close()

    def _alive(self, now: float) -> None:
        """Feeds the watchdog while the worker's thread runs. Only a new process restarts a failed worker."""
        self.manager.alive(now, lambda: self.source.lives)
        self._watchdog.at(self.manager.next_wake())

    def _close(self) -> None:
        self.manager.stopping()
        self.source.close()
        self._loop.remove(self._waker)
        self._waker.close()
        self._loop.close()
        self.log("source-closed")
        self.log.flush()


def main(settings: SourceSettings, faults: Sequence[Fault] = ()) -> None:
    """Runs a quota source in this process until SIGTERM, SIGINT or SIGHUP. OSError, UsageError, ConfigError before it
    is ready. `faults`: files that others could change, for the log."""
    harden()
    raise_descriptor_limit()
    prefer_us()
    place = own_place(settings.folder) if settings.folder else Place(SYSTEM_FOLDER)  # state is kept there
    setup = with_room_kept(configured(place))
    hardened = of_quota_source(setup.state, config.settings("hardening").get("broker", True))
    process = SourceProcess(place, setup, Manager())
    process.heed_signals()
    process.source.hardening = hardened._asdict()
    process.log("privileges-dropped", **hardened._asdict())
    log_faults(faults, process.log)
    gc.freeze()
    process.run()
