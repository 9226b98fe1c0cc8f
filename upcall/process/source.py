"""Defines the interface of sources, which pass requests from a kernel interface or requesters to the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from upcall.core.router import Router
from upcall.process.log import EventLog
from upcall.process.loop import Loop

if TYPE_CHECKING:
    from upcall.process.people import People


class Source:
    """Serves from its construction (OSError, UsageError) until `close`. All methods run in the loop's thread."""

    name = ""

    def __init__(self, loop: Loop, router: Router, log: EventLog) -> None:
        self.loop, self.router, self.log = loop, router, log

    def status(self, uid: int | None) -> dict[str, object]:
        """Returns entries for `upcall status` by name, as plain data: of one uid, or of all (None)."""
        return {}

    def follow(self, owners: Mapping[str, int]) -> None:
        """Applies a reloaded configuration. `owners`: service -> uid whose daemon answers requests that name none."""

    @property
    def lives(self) -> bool:
        """False if the source has failed and only a restart of the process can fix it: the watchdog then does that."""
        return True

    def close(self) -> None:
        """Closes the source. The router has settled all requests before."""


# (loop, router, log, people); OSError, UsageError
MakeSource = Callable[[Loop, Router, EventLog, "People"], Source]
