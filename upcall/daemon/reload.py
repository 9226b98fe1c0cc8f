"""Reloads the daemon's plugins and settings, on SIGHUP or a command, from the next request on.

Running requests are completed, also by a plugin that is no longer allowed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from typing import Final

from upcall.core.errors import ModuleFailed
from upcall.daemon.loading import handlers, loaders
from upcall.daemon.process import Daemon
from upcall.handler import Handler
from upcall.process import start_python as startpython
from upcall.process.log import EventLog
from upcall.process.reload import Reloading
from upcall.protocols.ecryptfs.auto_lock import ARGUMENTS, Locking
from upcall.protocols.ecryptfs.key_handler import KeyHandler

PATIENCE: Final = 30.0  # seconds, the time-out of plugin discovery

_FOUND: Final = ("module", "isolated", "denied", "handler", "isolate", "inline")  # the arguments that it gives
_WISHES: Final = ("isolate", "inline")  # those that it is given


class Renewing:
    """`find(arguments)` gives the arguments that `upcall.daemon.plugin_discovery` finds; ModuleFailed, OSError."""

    def __init__(
        self,
        arguments: Iterable[str],
        keys: KeyHandler,
        daemon: Daemon,
        log: EventLog,
        find: Callable[[list[str]], list[str]] | None = None,
        locking: Locking | None = None,
    ) -> None:
        """`daemon` and `keys` have loaded the handlers and modules of these arguments."""
        self._arguments = _of(arguments, _FOUND)
        self._keys, self._daemon, self._log = keys, daemon, log
        self._find = find or find_in_child
        self._locking = locking
        self._reloading = Reloading(self._renew)

    def ask(self) -> None:
        """Starts a reload in a thread of its own. Does not block."""
        self._reloading.ask()

    def _renew(self) -> None:
        try:
            told = self._find(_of(self._arguments, _WISHES))
        except (ModuleFailed, OSError) as error:
            self._log("reload-failed", why=error)
            return
        found = _of(told, _FOUND)
        if self._locking is not None:
            self._locking.use(_of(told, ARGUMENTS))
        importlib.invalidate_caches()  # a plugin may have been installed since
        before, self._arguments = self._arguments, found
        same = {*before} & {*found}
        self._keys.cache.use(
            loaders(found, self._keys.deadline, self._log),
            {_name(argument) for argument in same if not argument.startswith("handler=")},
        )
        gone = {_name(argument) for argument in _of(before, ("handler",)) if argument not in same}
        new: list[Handler] = handlers([argument for argument in found if argument not in same])
        self._daemon.use(gone, new)
        self._log("configuration-reloaded", more=_shown({*found} - same), less=_shown({*before} - {*found}))


def find_in_child(wishes: list[str]) -> list[str]:
    """Runs plugin discovery in a process. Returns the daemon's arguments. ModuleFailed with its error text."""
    import subprocess  # a daemon that is never told to reload does not pay for it

    try:
        done = subprocess.run(
            startpython.command("upcall.daemon.plugin_discovery", *wishes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=startpython.cleaned(),
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModuleFailed(f"what is installed could not be found within {PATIENCE:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise ModuleFailed(said[-1])
    found: list[str] = json.loads(done.stdout)
    return found


def _of(arguments: Iterable[str], kinds: Iterable[str]) -> list[str]:
    return [argument for argument in arguments if argument.partition("=")[0] in kinds]


def _name(argument: str) -> str:
    return argument.split("=", 2)[1]


def _shown(arguments: Iterable[str]) -> str:
    """Returns the names of the plugins, without their entry points, for the log."""
    words = sorted({"=".join(argument.split("=", 2)[:2]) for argument in _of(arguments, _FOUND[:4])})
    return ",".join(words) or "nothing"
