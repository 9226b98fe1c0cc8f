"""Loads key modules when a key first needs them, and replaces them on reload."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Protocol, runtime_checkable

from upcall.core.errors import Refused
from upcall.keymodule import KeyModule

Loaders = Mapping[str, Callable[[], KeyModule]]  # alias -> loads its key module; raises what the module raises


@runtime_checkable
class Reporting(Protocol):
    """A module that reports its status: one in a process of its own (upcall.daemon.isolation)."""

    def report(self) -> dict[str, object]: ...


class KeyModules:
    """The loaded key modules, by alias. Thread-safe: see KeyCache for its lock."""

    def __init__(self, loaders: Loaders) -> None:
        self._lock = threading.Lock()
        self._loaders = loaders
        self._loaded: dict[str, KeyModule] = {}

    def get(self, alias: str) -> KeyModule:
        """Returns a module, and loads it first if need be. Refused("no-module"); else what its loader raises."""
        while True:
            with self._lock:
                module, load = self._loaded.get(alias), self._loaders.get(alias)
            if module is not None:
                return module
            if load is None:
                raise Refused("no-module", why=f"key module {alias!r}: `upcall plugin list` has the installed ones")
            loaded = load()
            with self._lock:
                if self._loaders.get(alias) is load:  # no reload has replaced it meanwhile
                    return self._loaded.setdefault(alias, loaded)  # another thread may have loaded it

    def has(self, alias: str, module: KeyModule) -> bool:
        """Returns whether this is still the alias's module: no reload has removed or replaced it."""
        return self._loaded.get(alias) is module

    def replace(self, loaders: Loaders, same: Collection[str]) -> None:
        """Replaces the modules, except those of the aliases in `same`. Loads none."""
        with self._lock:
            self._loaders = {alias: self._loaders[alias] if alias in same else loaders[alias] for alias in loaders}
            for alias in [alias for alias in self._loaded if alias not in same]:
                del self._loaded[alias]

    def reports(self) -> list[dict[str, object]]:
        """Returns the status of each module that reports one, as plain data."""
        return [module.report() for module in list(self._loaded.values()) if isinstance(module, Reporting)]
