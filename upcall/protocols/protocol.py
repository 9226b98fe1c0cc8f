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
    owners: Mapping[str, int] = {}  # by service, whose daemon answers for requests that do not say it


def _no_source(given: Given) -> None:
    return None


class Protocol(NamedTuple):
    """One kind of kernel upcall, or of requests that are handled in the same way."""

    name: str
    services: tuple[Service, ...] = ()  # what the broker is asked for, and by which rules
    tables: tuple[Table, ...] = ()  # of the configuration
    # What doctor looks for in the kernel: (what it then can do, module, option of its configuration)
    kernel: tuple[tuple[str, str, str], ...] = ()
    # What faces the kernel in the broker's process, imported when it is wanted; None: not there.
    # UsageError, ConfigError.
    source: Callable[[Given], MakeSource | None] = _no_source
    notices: tuple[Notice, ...] = ()  # what sources in processes of their own have it tell, by the source's name
