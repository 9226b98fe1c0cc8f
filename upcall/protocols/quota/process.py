"""Runs the quota source as a process: one loop with the kernel's socket and the broker's, and the worker's thread."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from upcall import config
from upcall.core.errors import UsageError
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, prefer_us, raise_descriptor_limit
from upcall.process.hardening import of_quota_source
from upcall.process.log import EventLog
from upcall.process.loop_process import LoopProcess
from upcall.process.paths import SYSTEM_FOLDER, Place, own_place
from upcall.process.trust import Fault, log_faults
from upcall.protocols.quota.settings import SourceSettings
from upcall.protocols.quota.setup import configured
from upcall.protocols.quota.source import QuotaSetup, QuotaSource, with_room_kept


class SourceProcess(LoopProcess):
    """Runs a quota source until `stop`, which delivers pending notices and writes the state at its end. `run` raises
    UsageError if the broker has another quota source, which would send everything twice."""

    ready = "listening to the kernel's quota warnings"

    def __init__(
        self, place: Place, setup: QuotaSetup, manager: Manager | None = None, log: EventLog | None = None
    ) -> None:
        super().__init__(log or EventLog("upcall-quota"), manager)
        self.source = QuotaSource(self.loop, place, self.log, setup)

    def look(self) -> None:
        if self.source.superfluous:
            raise UsageError("the broker has a quota source already")

    def lives(self) -> bool:
        """Returns whether the worker's thread runs. Only a new process restarts a failed worker."""
        return self.source.lives

    def close_source(self) -> None:
        self.source.close()


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
