"""What faces a kernel interface, or asks for others: gives the router requests, and takes the outcome back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from upcall.core.router import Router
from upcall.process.log import EventLog
from upcall.process.loop import Loop

if TYPE_CHECKING:
    from upcall.process.people import People


class Source:
    """Serves from its construction on (OSError, UsageError) until `close`. All of it in the loop's thread."""

    name = ""

    def __init__(self, loop: Loop, router: Router, log: EventLog) -> None:
        self.loop, self.router, self.log = loop, router, log

    def status(self, uid: int | None) -> dict[str, object]:
        """For `upcall status`, of one uid or of all: what belongs into the whole, by name."""
        return {}

    def follow(self, owners: Mapping[str, int]) -> None:
        """The configuration was read again. `owners`: by service, the uid whose daemon answers if requests do not
        say it."""

    @property
    def lives(self) -> bool:
        """False if only a new process could serve this."""
        return True

    def close(self) -> None:
        """What is owed has been refused already."""


# (loop, router, log, people); OSError, UsageError
MakeSource = Callable[[Loop, Router, EventLog, "People"], Source]
