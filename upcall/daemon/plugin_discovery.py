"""`python -m upcall.daemon.plugin_discovery OVERRIDES`: finds allowed plugins, and when keys lock.

Takes `Overrides` and prints `Discovered`, both as upcall/process/settings.py packs them. Runs in a process that ends,
or that becomes the daemon by exec: importlib.metadata would double the daemon's start-up time and cost 5 MB.
"""

from __future__ import annotations

import os
import sys

from upcall import config
from upcall.config.keys import defaults
from upcall.core.errors import UpcallError, UsageError
from upcall.daemon.plugins import Discovered, Module, Overrides, Plugins, ServiceHandler
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP as KEY_MODULES
from upcall.keys.plugins import installed
from upcall.process import machine
from upcall.process.logind import SUSPEND
from upcall.process.settings import dumps, of_arguments
from upcall.protocols.ecryptfs.settings import LockSettings


def found(overrides: Overrides) -> Plugins:
    """Returns the installed plugins: handlers only if they are allowed. ConfigError; UsageError if an alias of
    `overrides` is unknown or not allowed."""
    isolate, inline = overrides
    plugins, configured = installed(), config.load()
    modules = {one.alias: one for one in plugins if one.group == KEY_MODULES}
    chosen = {*isolate, *inline}
    if unknown := sorted(chosen - modules.keys()):
        raise UsageError(f"there is no key module {unknown[0]!r}: {', '.join(modules) or 'none'} installed")
    if both := sorted({*isolate} & {*inline}):
        raise UsageError(f"{both[0]!r} cannot be both isolated and inline")
    denied = {alias for alias in modules if not configured.allows(alias)}
    if named := sorted(denied & chosen):
        raise UsageError(configured.refusal(named[0]))
    apart = {*isolate, *(alias for alias, module in modules.items() if module.isolated)} - {*inline}
    handlers = [one for one in plugins if one.group == HANDLERS and configured.allows(one.alias) and not keys_only()]
    return Plugins(
        tuple(
            Module(alias, module.spec, alias in apart, configured.refusal(alias) if alias in denied else "")
            for alias, module in modules.items()
        ),
        tuple(ServiceHandler(one.alias, one.spec) for one in handlers),
        overrides,
    )


def locks() -> LockSettings:
    """Returns when keys lock automatically. ConfigError."""
    chosen = {**defaults(("keys",)), **config.settings("keys", user=True)}
    causes = (cause for cause in chosen["lock-on"] if cause == SUSPEND or not is_machines())
    return LockSettings(float(chosen["lock-after"]), tuple(causes))


def is_machines() -> bool:
    """Returns whether this daemon is root's or the machine's, which ignore screen locks and logins. ConfigError."""
    return os.geteuid() in (machine.ROOT, machine.uid())


def keys_only() -> bool:
    """Returns whether this daemon serves only root's keys. Handlers parse network data, so they run in the machine's
    daemon, under a uid of its own. ConfigError."""
    return os.geteuid() == machine.ROOT != machine.uid()


def main(arguments: list[str]) -> int:
    """Prints `Discovered`; errors go to stderr, with exit status EX_CONFIG."""
    try:
        plugins = found(of_arguments(Overrides, arguments))
        print(dumps(Discovered(plugins, locks())))  # noqa: T201
    except (UpcallError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return os.EX_CONFIG
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
