"""What the configuration says to the broker: read when it starts, and again on SIGHUP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from upcall import config
from upcall.broker.launcher import usual
from upcall.core.router import Limits
from upcall.core.service import Service
from upcall.process import machine
from upcall.protocols.request_key.key_types import OF_THE_SYSTEM


class Configured(NamedTuple):
    services: Mapping[str, Service]
    owners: Mapping[str, int]  # by type, whose daemon answers for keys that do not say it
    start: Sequence[str]  # the command that starts a daemon
    hardening: bool = True  # whether the broker takes from itself what it does not need
    limits: Limits = Limits()
    machine: int = machine.ROOT  # the uid of the machine's daemon

    @property
    def command(self) -> Sequence[str] | None:
        """What starts a daemon, if any service wants daemons started."""
        return self.start if any(one.absent == "start" for one in self.services.values()) else None


def configured(services: Mapping[str, Service]) -> Configured:
    """The services with what the configuration says of them, and the rest of it. ConfigError. It may wait: for names
    of users, which can come from a directory."""
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
