"""How the system's broker serves quotas: what the configuration says, and where the state is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from upcall import config
from upcall.core.errors import UsageError
from upcall.kernel.genetlink import look_up
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.quota import warning as quota
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.source import QuotaSetup

STATE: Final = Path("/var/lib/upcall/quota.json")


def configured(place: Place, required: bool) -> QuotaSetup:
    """For a broker at this place. ConfigError. `required`: UsageError if the kernel has no quota warnings for us;
    otherwise the broker finds that out later, and says so in its log."""
    if os.geteuid() != 0:
        raise UsageError(
            "quota warnings are served by root's broker: other people's quotas are nobody else's business"
        )
    return QuotaSetup(rules(), state_file(place), look_up(quota.FAMILY, quota.GROUP) if required else None)


def state_file(place: Place) -> Path:
    return STATE if place.folder == SYSTEM_FOLDER else place.folder / "quota.json"


def rules() -> Rules:
    """The table [quota] of the system's configuration, but for what is the daemons' (sinks). ConfigError."""
    told = {key.replace("-", "_"): value for key, value in config.settings("quota").items()}
    return Rules(**{key: value for key, value in told.items() if key in Rules._fields})
