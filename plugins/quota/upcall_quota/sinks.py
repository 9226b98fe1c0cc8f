"""Selects the sinks to use, by configuration and user.

This plugin's sinks are listed here. Entry points are searched only if the configuration names another sink: that costs
a daemon 25 ms and 5 MB.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from upcall import config
from upcall.core.errors import UsageError
from upcall.keys import plugins as modules
from upcall.process import machine
from upcall.sink import Sink

Opener = Callable[[], Sink]

BUILT_IN: Final = {name: f"upcall_quota.{name}:sink" for name in ("desktop", "terminal", "log", "mail", "webhook")}
BUILT_IN["dbus"] = "upcall_quota.systembus:sink"

OF_USERS: Final = ("desktop", "terminal", "log")  # default for users' daemons: the user is logged in
OF_SYSTEM: Final = ("log", "dbus")  # default for the system; mail and webhook are added if they are configured
TABLE: Final = "quota"


def configured() -> dict[str, Opener]:
    """Returns the sinks for this process's user, by name. ConfigError."""
    return chosen(config.settings(TABLE, user=True), os.geteuid())


def chosen(settings: Mapping[str, Any], uid: int) -> dict[str, Opener]:
    """Returns the sinks that the table [quota] selects for the daemon of this uid. A sink is imported when it is
    opened."""
    if uid == machine.uid():
        also = tuple(name for name in ("mail", "webhook") if name in settings)
        names = settings.get("system-sinks", OF_SYSTEM + also)
    else:
        names = settings.get("sinks", OF_USERS)
    return {name: opener(name, settings) for name in names}


def known() -> set[str]:
    """Returns the names of all installed sinks."""
    return {*BUILT_IN, *modules.sinks()}


def opener(name: str, settings: Mapping[str, Any]) -> Opener:
    """Returns a function that opens the sink of this name."""
    return functools.partial(opened, name, settings)


def opened(name: str, settings: Mapping[str, Any]) -> Sink:
    """Opens the sink of this name. UsageError if there is none or its settings are wrong; ModuleFailed if it cannot be
    loaded."""
    if name in BUILT_IN:
        return modules.load_sink(BUILT_IN[name], name).open(settings.get(name, {}))
    found = modules.sinks()
    if name not in found:
        raise UsageError(f"there is no sink {name!r}: {', '.join(sorted([*BUILT_IN, *found]))} installed")
    if not (allowed := config.load()).allows(name):
        raise UsageError(allowed.refusal(name))
    return modules.load_sink(found[name], name).open(settings.get("sink", {}).get(name, {}))
