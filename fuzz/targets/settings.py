"""What a process is told at its start, and what plugin discovery prints: typed settings as JSON.

UsageError, which names the field, or settings whose text gives them again.
"""

from __future__ import annotations

from pathlib import Path

from fuzz.target import same
from upcall.broker.settings import BrokerSettings
from upcall.core.errors import UsageError
from upcall.daemon.plugins import Discovered, Module, Overrides, Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.process.hardening import DaemonHardening
from upcall.process.settings import dumps, loads
from upcall.protocols.ecryptfs.settings import AddedKey, FailedKey, LockSettings, LoginKeys

_PLUGINS = Plugins((Module("a", "b:c", True, "no"),), (ServiceHandler("x", "y:z"),), Overrides(("a",), ("b",)))
_LOCKING = LockSettings(1.5, ("suspend",))
_KEYS = LoginKeys(Path("/k"), (AddedKey("a", "0" * 16),), (FailedKey("b.toml", "\udcff"),))
_HARDENING = DaemonHardening(False, False, (Path("/srv"),))
SEEDS = [
    dumps(
        DaemonSettings(Path("/x"), True, plugins=_PLUGINS, locking=_LOCKING, hardening=_HARDENING, keys=_KEYS)
    ).encode(),
    dumps(BrokerSettings(Path("/x"), Path("/dev/ecryptfs"), 8, "no")).encode(),
    dumps(Discovered(_PLUGINS, _LOCKING)).encode(),
    b'{"prompting": {"pin_time": 1e999, "pinentry": null}}',
]


def run(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for kind in (DaemonSettings, BrokerSettings, Discovered):
        try:
            settings = loads(kind, text)
        except UsageError as error:
            same(str(error)[:10], "settings: ")
        else:
            same(loads(kind, dumps(settings)), settings)
