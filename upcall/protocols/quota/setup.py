"""Reads the configuration of the quota source, and chooses where it keeps its state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from upcall import config
from upcall.core.errors import UsageError
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.source import QuotaSetup

STATE: Final = Path("/var/lib/upcall/quota.json")


def configured(place: Place) -> QuotaSetup:
    """Returns the setup for the broker at `place`. ConfigError; UsageError if not run as root."""
    if os.geteuid() != 0:
        raise UsageError("quota warnings concern all users: run the quota source as root")
    return QuotaSetup(rules(), STATE if place.folder == SYSTEM_FOLDER else place.folder / "quota.json")


def rules() -> Rules:
    """Reads the table [quota] of the system's configuration, without the keys of daemons (sinks). ConfigError."""
    values = {key.replace("-", "_"): value for key, value in config.settings("quota").items()}
    return Rules(**{key: value for key, value in values.items() if key in Rules._fields})
