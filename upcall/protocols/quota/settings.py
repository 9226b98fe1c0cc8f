"""The settings of the quota source: of its command line, and of the table [quota] of the configuration. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class SourceSettings(NamedTuple):
    """Of the command line: made by `upcall quota serve`, passed across exec by upcall/process/settings.py."""

    folder: Path | None = None  # the broker's; None: the system's


class Rules(NamedTuple):
    """Of the configuration. Times in seconds."""

    thresholds: tuple[int, ...] = (80, 90)  # per cent of the limit at which people are told early, ascending
    hysteresis: int = 5  # per cent of the limit: how far usage must fall before it counts as fallen
    interval: float = 300.0  # between two readings of all quotas
    near_interval: float = 30.0  # the same for those who are near a limit, or over it
    settle: float = 10.0  # how long somebody must have been below before it is called over
    remind: float = 3600.0  # until a warning that goes on is told again
    digest_after: int = 5  # notices to one person within `digest_within`: what is more is put together
    digest_within: float = 600.0
    copy_to_system: bool = False  # the system's daemon hears what users are told, too
