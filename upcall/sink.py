"""Defines the interface of sinks, which deliver quota warnings to people: by desktop, mail, terminal.

A kind of sink is any object with the members of `SinkModule`; nothing is inherited. It is found by an entry point of
the group `upcall.sinks`, under the name that `[quota] sinks` in the configuration uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from upcall.core.errors import ModuleFailed

if TYPE_CHECKING:  # imported by every daemon, and few ever get a quota notice
    from upcall.protocols.quota.notice import QuotaNotice

GROUP = "upcall.sinks"


class TryLater(ModuleFailed):
    """Delivery failed and may succeed later: the network is down, or the user is not logged in yet."""


class Sink(Protocol):
    """Delivers warnings. Called in a thread of its own: it may block, but must time out."""

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        """Delivers a warning. `text`: the notice in a sentence or two, on one line. Names in `notice` are untrusted
        and may contain any character, also line feeds.

        TryLater: delivery is retried later, unless a newer warning replaces it. ModuleFailed: no retry.
        """


@runtime_checkable
class ClosableSink(Protocol):
    """A sink with resources to release."""

    def close(self) -> None:
        """Releases the resources. `tell` is not called any more."""


class SinkModule(Protocol):
    """A kind of sink."""

    name: str  # as in the configuration

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        """Makes a sink. Must not block. `settings`: its table [quota.sink.NAME], unchecked. UsageError on a wrong
        key, which the text names."""
