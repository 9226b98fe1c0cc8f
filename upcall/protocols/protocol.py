"""Defines the record that describes a protocol to the rest of upcall."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from upcall.config.table import Table
from upcall.core.service import Notice, Service

if TYPE_CHECKING:
    from upcall.process.paths import Place
    from upcall.process.source import MakeSource


class Given(NamedTuple):
    """The broker's start-up options that a source may need."""

    place: Place
    device: Path | None = None  # path of /dev/ecryptfs; None: not served
    owners: Mapping[str, int] = {}  # service -> uid whose daemon answers, for services whose requests name no uid


def _no_source(given: Given) -> None:
    return None


class Protocol(NamedTuple):
    """Describes one kind of kernel upcall: its services, configuration tables, source and notices."""

    name: str
    services: tuple[Service, ...] = ()  # service names that the broker accepts, with their limits and checks
    tables: tuple[Table, ...] = ()  # of the configuration
    # Kernel support that `upcall doctor` checks: (capability for people, module, CONFIG_ option)
    kernel: tuple[tuple[str, str, str], ...] = ()
    # Returns the constructor of the source in the broker's process, or None if this broker has none. Imports the
    # source only when called. UsageError, ConfigError.
    source: Callable[[Given], MakeSource | None] = _no_source
    notices: tuple[Notice, ...] = ()  # notices of its source in a process of its own, by the source's name
