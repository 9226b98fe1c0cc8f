"""Which sinks there are, and which of them are used.

Those of this plugin are known by name: looking for entry points costs a daemon 25 ms and 5 MB, so only who names
another sink in the configuration pays for it.
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

OF_USERS: Final = ("desktop", "terminal", "log")  # who has a daemon is logged in, or was
OF_SYSTEM: Final = ("log", "dbus")  # with mail and webhook as soon as they have a table of their own
TABLE: Final = "quota"


def configured() -> dict[str, Opener]:
    """The sinks of this process's user, by name. ConfigError."""
    return chosen(config.settings(TABLE, user=True), os.geteuid())


def chosen(settings: Mapping[str, Any], uid: int) -> dict[str, Opener]:
    """The sinks that the table [quota] chooses for this uid's daemon. Nothing is imported before one is opened."""
    if uid == machine.uid():
        also = tuple(name for name in ("mail", "webhook") if name in settings)
        names = settings.get("system-sinks", OF_SYSTEM + also)
    else:
        names = settings.get("sinks", OF_USERS)
    return {name: opener(name, settings) for name in names}


def known() -> set[str]:
    """Every sink that is installed, whether it is used or not."""
    return {*BUILT_IN, *modules.sinks()}


def opener(name: str, settings: Mapping[str, Any]) -> Opener:
    """What opens the sink of this name."""
    return functools.partial(opened, name, settings)


def opened(name: str, settings: Mapping[str, Any]) -> Sink:
    """The sink of this name. UsageError if there is none or it is set up wrongly, ModuleFailed if it is broken."""
    if name in BUILT_IN:
        return modules.load_sink(BUILT_IN[name], name).open(settings.get(name, {}))
    found = modules.sinks()
    if name not in found:
        raise UsageError(f"there is no sink {name!r}: {', '.join(sorted([*BUILT_IN, *found]))} installed")
    if not (allowed := config.load()).allows(name):
        raise UsageError(allowed.refusal(name))
    return modules.load_sink(found[name], name).open(settings.get("sink", {}).get(name, {}))
