"""Which plugins a daemon may load: found by plugin_discovery, loaded by loading, compared by reload."""

from __future__ import annotations

from typing import NamedTuple

from upcall.protocols.ecryptfs.settings import LockSettings


class Module(NamedTuple):
    """An installed key module."""

    alias: str
    spec: str  # "package:attribute"
    isolated: bool = False  # runs in a process of its own
    denied: str = ""  # why it must not be loaded; its keys are refused with that


class ServiceHandler(NamedTuple):
    """An installed and allowed handler."""

    service: str
    spec: str  # "package:attribute"


class Overrides(NamedTuple):
    """Aliases of the key modules for which the user decides how they run, whatever their author says."""

    isolate: tuple[str, ...] = ()
    inline: tuple[str, ...] = ()


class Plugins(NamedTuple):
    modules: tuple[Module, ...] = ()
    handlers: tuple[ServiceHandler, ...] = ()
    overrides: Overrides = Overrides()  # for the next discovery


class Discovered(NamedTuple):
    """What changes with a reload."""

    plugins: Plugins = Plugins()
    locking: LockSettings = LockSettings()
