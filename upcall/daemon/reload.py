"""Reloads the daemon's plugins and settings, on SIGHUP or a command, from the next request on.

Running requests are completed, also by a plugin that is no longer allowed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Final

from upcall.core.errors import ModuleFailed, UsageError
from upcall.daemon.loading import handlers, loaders
from upcall.daemon.plugins import Discovered, Module, Overrides, Plugins
from upcall.daemon.process import Daemon
from upcall.process import start_python as startpython
from upcall.process.log import EventLog
from upcall.process.reload import Reloading
from upcall.process.settings import dumps, loads
from upcall.protocols.ecryptfs.auto_lock import Locking
from upcall.protocols.ecryptfs.key_handler import KeyHandler

PATIENCE: Final = 30.0  # seconds, the time-out of plugin discovery


class Renewing:
    """Replaces a daemon's plugins and its settings of locking by those that are found anew."""

    def __init__(
        self,
        plugins: Plugins,
        keys: KeyHandler,
        daemon: Daemon,
        log: EventLog,
        find: Callable[[Overrides], Discovered] | None = None,
        locking: Locking | None = None,
    ) -> None:
        """`plugins`: those that `daemon` and `keys` have. `find`: plugin discovery; ModuleFailed, OSError."""
        self._plugins = plugins
        self._keys, self._daemon, self._log = keys, daemon, log
        self._find = find or find_in_child
        self._locking = locking
        self._reloading = Reloading(self._renew)

    def ask(self) -> None:
        """Starts a reload in a thread of its own. Does not block. RuntimeError, logged, if there are no threads."""
        try:
            self._reloading.ask()
        except RuntimeError as error:
            self._log("reload-failed", why=error)
            raise

    def on_hangup(self) -> None:
        """Does the same for SIGHUP, which has no requester: the daemon goes on with what it has. Does not raise."""
        with contextlib.suppress(RuntimeError):
            self.ask()

    def _renew(self) -> None:
        try:
            found, locking = self._find(self._plugins.overrides)
        except (ModuleFailed, OSError) as error:
            self._log("reload-failed", why=error)
            return
        if self._locking is not None:
            self._locking.use(locking)
        importlib.invalidate_caches()  # a plugin may have been installed since
        before, self._plugins = self._plugins, found
        self._keys.cache.use(
            loaders(found.modules, self._keys.deadline, self._log),
            {module.alias for module in found.modules if module in before.modules},
        )
        gone = {handler.service for handler in before.handlers if handler not in found.handlers}
        self._daemon.use(gone, handlers(handler for handler in found.handlers if handler not in before.handlers))
        self._log("configuration-reloaded", more=_only_in(found, before), less=_only_in(before, found))


def find_in_child(overrides: Overrides) -> Discovered:
    """Runs plugin discovery in a process. ModuleFailed with its error text."""
    import subprocess  # a daemon that is never told to reload does not pay for it

    try:
        done = subprocess.run(
            startpython.command("upcall.daemon.plugin_discovery", dumps(overrides)),
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
    try:
        return loads(Discovered, done.stdout.decode("utf-8", "replace"))
    except UsageError as error:  # for example, upcall has been upgraded
        raise ModuleFailed(f"{error}: restart the daemon if it is older than what is installed") from None


def _only_in(these: Plugins, others: Plugins) -> str:
    """Returns the names of the plugins that are only in `these`, for the log."""
    words = [f"{_kind(module)}={module.alias}" for module in these.modules if module not in others.modules]
    words += [f"handler={handler.service}" for handler in these.handlers if handler not in others.handlers]
    return ",".join(sorted(words)) or "nothing"


def _kind(module: Module) -> str:
    return "denied" if module.denied else "isolated" if module.isolated else "module"
