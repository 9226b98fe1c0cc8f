"""What a sink is: a place where people look, at which they are told of their quotas.

A kind of sink is any object with the members of `SinkModule`; nothing is inherited. It is found by an entry point of
the group `upcall.sinks` whose name is the one that `[quota] sinks` in the configuration has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from upcall.core.errors import ModuleFailed

if TYPE_CHECKING:  # every daemon imports this page, and few are ever told of a quota
    from upcall.protocols.quota.notice import QuotaNotice

GROUP = "upcall.sinks"


class TryLater(ModuleFailed):
    """It could not be told now, and another try may succeed: the network is down, nobody is logged in yet."""


class Sink(Protocol):
    """Tells people. One thread calls it, which it has for itself: it may wait, but not for ever."""

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        """`text` is the notice in a sentence or two, on one line. Names in the notice hold anything, line feeds too.

        TryLater for another try in a while, unless something newer is to be said by then; ModuleFailed for none.
        """


@runtime_checkable
class ClosableSink(Protocol):
    """What a sink has as well if it holds something open."""

    def close(self) -> None:
        """No more will be told."""


class SinkModule(Protocol):
    """A kind of sink."""

    name: str  # as in the configuration

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        """Ready to tell; quick. `settings`: its table [quota.sink.NAME], unchecked. UsageError names a wrong key."""
