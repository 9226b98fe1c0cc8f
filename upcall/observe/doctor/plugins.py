"""Checks the installed plugins, importing each in a process of its own: third-party code may hang, crash, or print."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from upcall import config
from upcall.core.errors import ModuleFailed
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP
from upcall.keys import plugins as modules
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.process import start_python as startpython
from upcall.process import trust

PATIENCE = 20.0  # seconds, the time-out of each import; an emulated processor needs 15
LIBRARY = "libgssapi_krb5.so.2"  # as in upcall_spnego.gssapi


def trusted(scene: Scene) -> Iterator[Finding]:
    """Checks owners and modes of the interpreter, sys.path and the files below it; runs nothing of it."""
    finding = problem if scene.uid == 0 else note  # an ordinary user risks only that user's processes
    for fault in scene.faults:
        yield finding(
            f"another user could change code that is run: {fault}", "check who changed it, and what", fault.command
        )
    if not scene.faults:
        yield ok("no other user can change what is run here")


def importable(scene: Scene) -> Iterator[Finding]:
    """Checks that each allowed plugin can be imported and has this version of the interface."""
    configured = config.load()
    allowed = []
    for plugin in modules.installed():
        if configured.allows(plugin.alias):
            allowed.append(plugin)
        else:
            yield note(configured.refusal(plugin.alias))
    if not allowed:
        yield note("no plugins are installed, or none is allowed", "see `upcall plugin list`")
    if scene.faults and scene.uid == 0:
        yield problem(
            f"no plugin was imported: others could change what would run: {scene.faults[0]}",
            "see the check of trust",
            scene.faults[0].command,
        )
        return
    with ThreadPoolExecutor(os.cpu_count()) as at_once:
        yield from at_once.map(_verdict, allowed)


def _verdict(plugin: modules.Installed) -> Finding:
    name = f"the plugin {plugin.alias!r} ({plugin.distribution} {plugin.version})"
    if os.geteuid() == 0 and (faults := trust.of_package(plugin.spec.partition(":")[0])):
        what = f"{name} was not imported: others could change {faults[0].path}: it {faults[0].why}"
        return problem(what, "check who changed it, and what", faults[0].command)
    remedy = "fix it, install it again, or leave it out by [plugins] allow"
    command = startpython.command("upcall.observe.doctor.plugins", plugin.group, plugin.alias, plugin.spec)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=startpython.cleaned(),
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return problem(f"{name} is not imported within {PATIENCE:g} s", remedy)
    if done.returncode == 0:
        return ok(f"{name} can be loaded")
    why = done.stdout.strip().splitlines()[-1:] or [f"importing it ended its process with {done.returncode}"]
    return problem(f"{name} cannot be loaded: {why[0]}", remedy)


def library(scene: Scene) -> Iterator[Finding]:
    """Checks that the Kerberos library is installed, if a handler for cifs.spnego is."""
    import ctypes

    if "cifs.spnego" not in modules.handlers() or not config.load().allows("cifs.spnego"):
        return
    try:
        ctypes.CDLL(LIBRARY)  # noqa: TID251 - not the C library
    except OSError as error:
        why = f"the handler cifs.spnego has no Kerberos library: {error}"
        yield problem(why, "or leave cifs.spnego out by [plugins] allow", "apt-get install libgssapi-krb5-2")
    else:
        yield ok(f"{LIBRARY} is there, for cifs.spnego")


def main(arguments: list[str]) -> int:
    """`GROUP ALIAS SPEC`: imports a plugin; prints why it cannot be loaded. Returns the exit status."""
    group, alias, spec = arguments
    try:
        if group == GROUP:
            modules.load(spec)
        elif group == HANDLERS:
            modules.load_handler(spec, alias)
        else:
            modules.load_sink(spec, alias)
    except ModuleFailed as error:
        print(" ".join(str(error).split()))  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
