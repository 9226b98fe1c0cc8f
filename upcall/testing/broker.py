"""`python -m upcall.testing.broker [system=FILE] ...`: runs a broker for a test; several may run at once.

`system=FILE`: replaces the system's configuration file. `related=yes`: determines which processes descend from a
daemon, as the real broker does; by default no process does, so that a test's process can be daemon and requester at
once. `subuid=FILE`: replaces /etc/subuid. `idle=SECONDS`: time-out of idle connections. `connections=N`: limit of
connections. `rights=yes`: accepts descriptors from peers, as on kernels before Linux 6.16.
"""

from __future__ import annotations

import sys
from pathlib import Path

from upcall import config
from upcall.broker.__main__ import run
from upcall.core.contexts import NO_LINE, Line
from upcall.kernel import ancestry
from upcall.process import listener, people
from upcall.process.listener import Listener


def strangers(pid: int) -> Line:
    """Returns the ancestry of a process as if it descended from no daemon."""
    return NO_LINE


def main(arguments: list[str]) -> int:
    settings = dict(argument.split("=", 1) for argument in arguments)
    if "system" in settings:
        file = Path(settings.pop("system"))
        config.SYSTEM, config.VENDOR = file, file.with_name("vendor.toml")  # type: ignore[misc]
    if settings.pop("related", "no") != "yes":
        ancestry.line_of = strangers
    if "subuid" in settings:
        people.SUBUID = Path(settings.pop("subuid"))  # type: ignore[misc]
    if settings.pop("rights", "no") == "yes":
        listener.takes_no_rights = lambda _: False  # type: ignore
    Listener.idle = float(settings.pop("idle", Listener.idle))
    Listener.in_all = int(settings.pop("connections", Listener.in_all))
    return run([f"{name}={value}" for name, value in settings.items()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
