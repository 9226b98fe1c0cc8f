"""`python -m upcall.daemon.plugin_discovery [isolate=ALIAS] [inline=ALIAS]`: finds allowed plugins.

Prints them as the daemon's arguments. Runs in a process that ends, or that becomes the daemon by exec:
importlib.metadata would double the daemon's start-up time and cost 5 MB.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection

from upcall import config
from upcall.config.keys import defaults
from upcall.core.errors import UpcallError, UsageError
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP as KEY_MODULES
from upcall.keys.plugins import installed
from upcall.process import machine
from upcall.process.logind import SUSPEND


def found(isolate: Collection[str] = (), inline: Collection[str] = ()) -> list[str]:
    """Returns the daemon's arguments for the installed and allowed plugins: see upcall.daemon.__main__. `isolate`,
    `inline`: aliases for which the user overrides the default. ConfigError; UsageError if an alias is unknown."""
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
    arguments = [
        f"{'isolated' if alias in apart else 'module'}={alias}={module.spec}"
        for alias, module in modules.items()
        if alias not in denied
    ]
    # Their keys are refused with the reason, not as if the module were not there.
    arguments += [f"denied={alias}={configured.refusal(alias)}" for alias in sorted(denied)]
    handlers = [one for one in plugins if one.group == HANDLERS and configured.allows(one.alias) and not keys_only()]
    arguments += [f"handler={one.alias}={one.spec}" for one in handlers]
    return arguments + [f"isolate={alias}" for alias in isolate] + [f"inline={alias}" for alias in inline]


def locks() -> list[str]:
    """Returns the daemon's arguments for locking keys automatically. ConfigError."""
    chosen = {**defaults(("keys",)), **config.settings("keys", user=True)}
    causes = [cause for cause in chosen["lock-on"] if cause == SUSPEND or not is_machines()]
    return [f"lock-after={chosen['lock-after']}", f"lock-on={','.join(causes)}"]


def is_machines() -> bool:
    """Returns whether this daemon is root's or the machine's, which ignore screen locks and logins. ConfigError."""
    return os.geteuid() in (machine.ROOT, machine.uid())


def keys_only() -> bool:
    """Returns whether this daemon serves only root's keys. Handlers parse network data, so they run in the machine's
    daemon, under a uid of its own. ConfigError."""
    return os.geteuid() == machine.ROOT != machine.uid()


def main(arguments: list[str]) -> int:
    """Prints the arguments as a JSON list; errors go to stderr, with exit status EX_CONFIG."""
    told = [argument.split("=", 1) for argument in arguments]
    try:
        wishes = ([alias for key, alias in told if key == which] for which in ("isolate", "inline"))
        print(json.dumps(found(*wishes) + locks()))  # noqa: T201
    except (UpcallError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return os.EX_CONFIG
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
