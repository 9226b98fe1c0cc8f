"""Says for errors what helps: the command that starts what is missing, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from upcall.core.errors import Refused, UpcallError
from upcall.core.reasons import described

_UNITS: Final = ("/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd", "/lib/systemd")
_RUNNING: Final = Path("/run/systemd/system")  # is there if systemd is process 1
_SCRIPTS: Final = ("/etc/init.d/upcall-broker", "/etc/init.d/upcall")  # of the package, and of `upcall setup`
_BROKER, _DAEMON, _ROOTS_DAEMON = "upcall-broker", "upcall-daemon", "upcall-root-daemon"


def start_of_broker() -> str:
    """Returns the command that starts the broker, in backquotes, and who may run it."""
    if not _RUNNING.is_dir() and (script := next(filter(os.path.exists, _SCRIPTS), "")):
        return f"`{script} start`" + ("" if os.geteuid() == 0 else " as root")
    if not _installed("system", _BROKER):
        return "`upcall broker`"
    return f"`systemctl start {_BROKER}`" + ("" if os.geteuid() == 0 else " as root")


def start_of_daemon() -> str:
    """Returns the command that starts this user's daemon, in backquotes."""
    if os.geteuid() == 0:
        return f"`systemctl start {_ROOTS_DAEMON}`" if _installed("system", _ROOTS_DAEMON) else "`upcall daemon`"
    return f"`systemctl --user start {_DAEMON}`" if _installed("user", _DAEMON) else "`upcall daemon`"


def with_remedy(error: UpcallError) -> str:
    """Returns the text of an error, and what helps, on one line."""
    if isinstance(error, Refused):
        return described(error.reason, error.why, error.by, error.key, start_of_daemon())
    kinds = {kind.__name__ for kind in type(error).__mro__}  # their modules are not imported for this
    if "NoBroker" in kinds:
        return f"{error}; start it: {start_of_broker()}"
    if "NoDaemon" in kinds:
        return f"{error}; start it: {start_of_daemon()}"
    return str(error)


def _installed(manager: str, unit: str) -> bool:
    """Returns whether the unit is installed, and systemd runs here. `manager`: "system" or "user"."""
    if not _RUNNING.is_dir():
        return False
    return any(Path(folder, manager, f"{unit}.service").exists() for folder in _UNITS)
