"""`python -m upcall.testing.broker [system=FILE] ...`: runs a broker for a test; several may run at once.

With `system=FILE` it has a system's configuration of its own. The process of a test may play a daemon and ask it, too;
so nobody is anybody's child for this broker, unless it is told `related=yes`. `subuid=FILE` stands for /etc/subuid;
`idle=SECONDS`, `connections=N`: when idle connections end, and how many there may be in all. `rights=yes`: as on a
kernel that lets others send descriptors to us (before Linux 6.16).
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
    """Of a process that descends from nobody."""
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
