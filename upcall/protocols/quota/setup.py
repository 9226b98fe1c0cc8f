"""How the system's quota source runs: what the configuration says, and where the state is kept."""

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
    """For the source of the broker at this place. ConfigError; UsageError if we are not root."""
    if os.geteuid() != 0:
        raise UsageError("quota warnings are heard by root's source: other people's quotas are nobody else's business")
    return QuotaSetup(rules(), STATE if place.folder == SYSTEM_FOLDER else place.folder / "quota.json")


def rules() -> Rules:
    """The table [quota] of the system's configuration, but for what is the daemons' (sinks). ConfigError."""
    told = {key.replace("-", "_"): value for key, value in config.settings("quota").items()}
    return Rules(**{key: value for key, value in told.items() if key in Rules._fields})
