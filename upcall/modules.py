"""Finding key modules by their entry points, and checking what was found.

importlib.metadata costs 25 ms, so it is imported when it is used: the daemon is handed the map of aliases.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from upcall.errors import ModuleFailed
from upcall.keymodule import API, GROUP, ISOLATED_GROUP, KeyModule

MAX_ALIAS = 16  # what an auth token has room for


class Found(NamedTuple):
    """An installed key module."""

    spec: str  # "package:attribute"
    isolated: bool  # its author says that it is better run in a process of its own


def available() -> dict[str, Found]:
    """Alias to every installed key module. None of them is imported.

    Where two claim an alias, the first on sys.path has it, as with modules.
    """
    from importlib.metadata import distributions

    found: dict[str, Found] = {}
    for distribution in distributions(path=_trusted_path()):
        points = distribution.entry_points
        isolated = {point.name for point in points.select(group=ISOLATED_GROUP)}
        for point in points.select(group=GROUP):
            if _is_alias(point.name):
                found.setdefault(point.name, Found(f"{point.module}:{point.attr}", point.name in isolated))
    return dict(sorted(found.items()))


def load(spec: str) -> KeyModule:
    """The key module at "package:attribute", checked. ModuleFailed says what is wrong with it."""
    package, colon, attribute = spec.partition(":")
    if not package or not colon or not attribute.isidentifier():
        raise ModuleFailed(f"key module {spec!r}: not of the form package:attribute")
    before = sys.path[:]
    sys.path[:] = _trusted_path()
    try:
        module = getattr(importlib.import_module(package), attribute)
    except Exception as error:  # importing runs code of others, which may raise anything
        raise ModuleFailed(f"key module {spec}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before
    return _checked(module, spec)


def _checked(module: object, spec: str) -> KeyModule:
    name, api = getattr(module, "name", None), getattr(module, "api", None)
    if not isinstance(name, str) or not _is_alias(name):
        raise ModuleFailed(f"key module {spec}: its name is not 1 to {MAX_ALIAS} printable ASCII characters")
    if api != API:
        raise ModuleFailed(f"key module {spec}: written for version {api} of the protocol, this is {API}")
    if not callable(getattr(module, "open", None)):
        raise ModuleFailed(f"key module {spec}: cannot open keys")
    return module  # type: ignore[return-value]


def _is_alias(name: str) -> bool:
    return 1 <= len(name) <= MAX_ALIAS and name.isascii() and name.isprintable()


def _trusted_path() -> list[str]:
    """sys.path without the working directory, which the interpreter puts first for `-c` and `-m`."""
    path = sys.path[:]
    if path and not sys.flags.safe_path and path[0] in ("", str(Path.cwd())):
        del path[0]
    return [entry for entry in path if entry not in ("", ".")]
