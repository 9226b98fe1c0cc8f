"""Finds plugins by their entry points, imports them and checks their interfaces.

importlib.metadata costs 25 ms, so it is imported on use only: the daemon receives the map of aliases as arguments.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from upcall import config
from upcall.core.errors import ModuleFailed, UsageError
from upcall.core.suggestion import did_you_mean
from upcall.handler import GROUP as HANDLERS
from upcall.handler import Handler
from upcall.keymodule import API, GROUP, ISOLATED_GROUP, KeyModule
from upcall.process import trust
from upcall.sink import GROUP as SINKS
from upcall.sink import SinkModule

MAX_ALIAS = 16  # characters: the field of an auth token


class Found(NamedTuple):
    """An installed key module."""

    spec: str  # "package:attribute"
    isolated: bool  # the plugin recommends a process of its own


class Installed(NamedTuple):
    """An installed plugin (key module, handler or sink), with metadata of its distribution."""

    alias: str
    group: str  # of entry points
    spec: str
    isolated: bool
    distribution: str
    version: str


def installed() -> list[Installed]:
    """Lists all installed plugins, sorted by group and alias. Imports none of them.

    If two plugins of a group have the same alias, the first on sys.path is listed, as for Python modules.
    """
    from importlib.metadata import distributions

    found: dict[tuple[str, str], Installed] = {}
    for distribution in distributions(path=_trusted_path()):
        points = distribution.entry_points
        isolated = {point.name for point in points.select(group=ISOLATED_GROUP)}
        for group in (GROUP, HANDLERS, SINKS):
            for point in points.select(group=group):
                if is_alias(point.name):
                    plugin = Installed(
                        point.name,
                        group,
                        f"{point.module}:{point.attr}",
                        group == GROUP and point.name in isolated,
                        distribution.metadata["Name"],
                        distribution.version,
                    )
                    found.setdefault((group, point.name), plugin)
    return [found[key] for key in sorted(found)]


def available() -> dict[str, Found]:
    """Returns alias -> key module, for all that are installed. Imports none. Includes modules that the configuration
    does not allow: see `find`."""
    return {one.alias: Found(one.spec, one.isolated) for one in installed() if one.group == GROUP}


def find(alias: str) -> Found:
    """Returns the key module with this alias. UsageError if it is not installed, or the configuration does not allow
    it."""
    found = available()
    if alias not in found:
        suggested = did_you_mean(alias, found)
        raise UsageError(
            f"there is no key module '{alias}'{suggested or ': ' + (', '.join(found) or 'none') + ' installed'}"
        )
    configured = config.load()
    if not configured.allows(alias):
        raise UsageError(configured.refusal(alias))
    return found[alias]


def handlers() -> dict[str, str]:
    """Returns service -> "package:attribute", for all installed handlers. Imports none. Includes handlers that the
    configuration does not allow."""
    return {one.alias: one.spec for one in installed() if one.group == HANDLERS}


def sinks() -> dict[str, str]:
    """Returns name -> "package:attribute", for all installed sinks. Imports none. Includes sinks that the
    configuration does not allow."""
    return {one.alias: one.spec for one in installed() if one.group == SINKS}


def load(spec: str) -> KeyModule:
    """Imports the key module at "package:attribute" and checks its interface. ModuleFailed names what is wrong."""
    return _checked(_imported(spec, "key module"), spec)


def load_handler(spec: str, service: str) -> Handler:
    """Imports the handler of this service at "package:attribute" and checks its interface. ModuleFailed."""
    handler = _imported(spec, "handler")
    if service not in (services if isinstance(services := getattr(handler, "services", None), tuple) else ()):
        raise ModuleFailed(f"handler {spec}: its services do not name {service!r}")
    if not callable(getattr(handler, "lane", None)) or not callable(getattr(handler, "answer", None)):
        raise ModuleFailed(f"handler {spec}: cannot answer")
    return handler  # type: ignore[no-any-return]


def load_sink(spec: str, name: str) -> SinkModule:
    """Imports the sink of this name at "package:attribute" and checks its interface. ModuleFailed."""
    sink = _imported(spec, "sink")
    if getattr(sink, "name", None) != name:
        raise ModuleFailed(f"sink {spec}: its name is not {name!r}")
    if not callable(getattr(sink, "open", None)):
        raise ModuleFailed(f"sink {spec}: cannot be opened")
    return sink  # type: ignore[no-any-return]


def _imported(spec: str, what: str) -> Any:
    package, colon, attribute = spec.partition(":")
    if not package or not colon or not attribute.isidentifier():
        raise ModuleFailed(f"{what} {spec!r}: not of the form package:attribute")
    before = sys.path[:]
    sys.path[:] = _trusted_path()
    try:
        if os.geteuid() == 0 and (faults := trust.of_package(package)):
            raise ModuleFailed(f"{what} {spec}: root would run it, but {faults[0]}: {faults[0].command}")
        return getattr(importlib.import_module(package), attribute)
    except ModuleFailed:
        raise
    except Exception as error:  # importing runs a plugin's code, which may raise anything
        raise ModuleFailed(f"{what} {spec}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before


def _checked(module: object, spec: str) -> KeyModule:
    name, api = getattr(module, "name", None), getattr(module, "api", None)
    if not isinstance(name, str) or not is_alias(name):
        raise ModuleFailed(f"key module {spec}: its name is not 1 to {MAX_ALIAS} printable ASCII characters")
    if api != API:
        raise ModuleFailed(f"key module {spec}: written for version {api} of the protocol, this is {API}")
    if not callable(getattr(module, "open", None)):
        raise ModuleFailed(f"key module {spec}: cannot open keys")
    return module  # type: ignore[return-value]


def is_alias(name: str) -> bool:
    return 1 <= len(name) <= MAX_ALIAS and name.isascii() and name.isprintable()


def _trusted_path() -> list[str]:
    """Returns sys.path without the working directory, which Python puts first for `-c` and `-m`."""
    path = sys.path[:]
    if path and not sys.flags.safe_path and path[0] in ("", str(Path.cwd())):
        del path[0]
    return [entry for entry in path if entry not in ("", ".")]
