"""`python -m upcall.testing.broker SETTINGS`: runs a broker for a test; several may run at once.

SETTINGS is `BrokerForTests` as upcall/process/settings.py packs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upcall import config
from upcall.broker.server import main
from upcall.broker.settings import BrokerSettings
from upcall.core.contexts import NO_LINE, Line
from upcall.kernel import ancestry
from upcall.process import entry, listener, people
from upcall.process.listener import Listener
from upcall.process.trust import Fault


class BrokerForTests(NamedTuple):
    """The settings of this process."""

    broker: BrokerSettings = BrokerSettings()
    system: Path | None = None  # the system's configuration file, instead of this machine's
    related: bool = False  # whether it looks who descends from whom; if not, a test can play a daemon and ask it, too
    subuid: Path | None = None  # instead of /etc/subuid
    idle: float | None = None  # seconds after which an idle connection ends
    connections: int | None = None  # at most, in all
    rights: bool = False  # as on a kernel that lets others send descriptors to us (before Linux 6.16)


def strangers(pid: int) -> Line:
    """Returns the ancestry of a process as if it descended from no daemon."""
    return NO_LINE


def run(settings: BrokerForTests, faults: Sequence[Fault]) -> None:
    if settings.system is not None:
        config.SYSTEM, config.VENDOR = settings.system, settings.system.with_name("vendor.toml")  # type: ignore[misc]
    if not settings.related:
        ancestry.line_of = strangers
    if settings.subuid is not None:
        people.SUBUID = settings.subuid  # type: ignore[misc]
    if settings.rights:
        listener.takes_no_rights = lambda _: False  # type: ignore
    if settings.idle is not None:
        Listener.idle = settings.idle
    if settings.connections is not None:
        Listener.in_all = settings.connections
    main(settings.broker, faults)


if __name__ == "__main__":
    sys.exit(entry.run("upcall.testing.broker", BrokerForTests, sys.argv[1:], run))
