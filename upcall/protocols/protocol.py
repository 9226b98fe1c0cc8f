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
    """The broker's start-up options that sources need."""

    place: Place
    device: Path | None = None  # /dev/ecryptfs, if it is to be served
    owners: Mapping[str, int] = {}  # service -> uid whose daemon answers requests that name none


def _no_source(given: Given) -> None:
    return None


class Protocol(NamedTuple):
    """One kind of kernel upcall, or several that are handled in the same way."""

    name: str
    services: tuple[Service, ...] = ()  # the requests that the broker routes
    tables: tuple[Table, ...] = ()  # its tables of the configuration
    # Checks of the kernel for doctor: (description, module, option of the kernel's configuration).
    kernel: tuple[tuple[str, str, str], ...] = ()
    # Returns the factory of the source that runs in the broker's process, imported on demand; None: no source.
    # UsageError, ConfigError.
    source: Callable[[Given], MakeSource | None] = _no_source
    notices: tuple[Notice, ...] = ()  # notices of its source in a process of its own, by the source's name
