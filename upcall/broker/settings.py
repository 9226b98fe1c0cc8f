"""The broker's settings: those of its command line, and those of the configuration, which SIGHUP reads again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from upcall import config
from upcall.broker.launcher import usual
from upcall.core.router import Limits
from upcall.core.service import Service
from upcall.process import machine
from upcall.protocols.request_key.key_types import OF_THE_SYSTEM


class BrokerSettings(NamedTuple):
    """Of the command line: made by `upcall broker`, passed across exec by upcall/process/settings.py."""

    folder: Path | None = None  # for the sockets; None: the usual one
    device: Path | None = None  # /dev/ecryptfs, if it is to be served
    contexts: int | None = None  # message contexts of each uid for each service; None: each service's own number
    records: str | None = None  # where a record of each request is written (observe/recorder.py); None: as configured


class Configured(NamedTuple):
    """Of the configuration."""

    services: Mapping[str, Service]
    owners: Mapping[str, int]  # key type -> uid whose daemon answers, for descriptions that name none
    start: Sequence[str]  # the command that starts a daemon
    hardening: bool = True  # whether the broker drops privileges at start-up
    limits: Limits = Limits()
    machine: int = machine.ROOT  # the uid of the machine's daemon

    @property
    def command(self) -> Sequence[str] | None:
        """The start command; None if no service is configured to start daemons."""
        return self.start if any(one.absent == "start" for one in self.services.values()) else None


def configured(services: Mapping[str, Service]) -> Configured:
    """Returns the settings, with `services` as configured. ConfigError. May block: user names are looked up, possibly
    in a name service."""
    tables = config.tables()
    told: dict[str, dict[str, str]] = tables.get("request-key", {})
    absent = {name: one["without-daemon"] for name, one in told.items() if "without-daemon" in one}
    return Configured(
        {name: one._replace(absent=absent.get(name, one.absent)) for name, one in services.items()},
        {name: _uid_of(name, told.get(name, {}).get("user", "root")) for name in OF_THE_SYSTEM},
        tables.get("daemon", {}).get("start") or usual(),
        tables.get("hardening", {}).get("broker", True),
        Limits(**{name.replace("-", "_"): value for name, value in tables.get("broker", {}).items()}),
        machine.read(),
    )


def _uid_of(kind: str, name: str) -> int:
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise config.blame(("request-key", kind, "user"), f"there is no user {name!r}") from None
