"""What loads the key modules that the daemon was told of when it was started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from upcall.errors import ModuleFailed
from upcall.keymodule import KeyModule
from upcall.log import EventLog
from upcall.modules import load


def loaders(
    arguments: Iterable[str], deadline: Callable[[], float], log: EventLog
) -> dict[str, Callable[[], KeyModule]]:
    """By alias, from `module=ALIAS=PACKAGE:NAME`, or `isolated=` for one that gets a process of its own.
    `denied=ALIAS=WHY`: it is installed, and is not to be loaded.

    `deadline()`: until when the request can wait that the calling thread serves; 0 if it serves none.
    """
    found: dict[str, Callable[[], KeyModule]] = {}
    for kind, value in (argument.split("=", 1) for argument in arguments):
        alias, _, spec = value.partition("=")
        if kind == "module":
            found[alias] = functools.partial(load, spec)
        elif kind == "isolated":
            found[alias] = functools.partial(_apart, alias, spec, deadline, log)
        elif kind == "denied":
            found[alias] = functools.partial(_denied, spec)
    return found


def _denied(why: str) -> KeyModule:
    raise ModuleFailed(why)


def _apart(alias: str, spec: str, deadline: Callable[[], float], log: EventLog) -> KeyModule:
    from upcall.isolation.module import IsolatedModule  # only who has one pays for it

    return IsolatedModule(alias, spec, deadline, log)
