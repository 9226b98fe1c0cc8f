"""`upcall daemon`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import click

from upcall import config
from upcall.cli import completing, output
from upcall.cli.parameter_types import EXECUTABLE, Seconds, runtime_option
from upcall.cli.tracebacks import TRACEBACK
from upcall.core.errors import UpcallError, UsageError
from upcall.daemon.plugin_discovery import found, keys_only, locks
from upcall.daemon.plugins import Overrides
from upcall.daemon.prompting.settings import PIN_TIME, PROMPT_TIME, WAYS, PromptSettings
from upcall.daemon.settings import DaemonSettings
from upcall.keys.mounts import mounts_directory
from upcall.observe.recorder import check_where, wanted
from upcall.process import start_python as startpython
from upcall.process.hardening import DaemonHardening
from upcall.process.settings import handed_over
from upcall.protocols.ecryptfs.auto_add import add_auto_keys

_FOREVER: Final = 1e9  # seconds, for "--pin-time inf"


@click.command("daemon")
@runtime_option(present=True)
@click.option(
    "--prove-all",
    is_flag=True,
    help="Unwrap every wrapped key before it is answered, not only the first of each size: slower, but detects a key "
    "module that fails later.",
)
@click.option(
    "--isolate",
    multiple=True,
    metavar="ALIAS",
    shell_complete=completing.key_modules,
    help="Run this key module in a process of its own.",
)
@click.option(
    "--inline",
    multiple=True,
    metavar="ALIAS",
    shell_complete=completing.key_modules,
    help="Run it in the daemon itself, whatever the plugin recommends.",
)
@click.option(
    "--pin-time",
    type=Seconds(most=_FOREVER, forever=True),
    default=PIN_TIME,
    show_default=True,
    metavar="SECONDS",
    help="How long a PIN stays in locked memory after its token accepted it; 0: it is asked for each time.",
)
@click.option(
    "--prompt-time",
    type=Seconds(5, 3600),
    default=PROMPT_TIME,
    show_default=True,
    metavar="SECONDS",
    help="The time-out of a prompt.",
)
@click.option(
    "--pinentry",
    type=EXECUTABLE,
    metavar="PATH",
    help="The program that asks on a desktop.  [default: pinentry, in PATH]",
)
@click.option(
    "--ask",
    default=",".join(WAYS),
    show_default=True,
    metavar="WAY,...",
    help="How to ask for PINs, in order of preference.",
)
@click.option(
    "--log-requests",
    metavar="WHERE",
    help="Where to write a record of each request: stderr, journal, or a file's absolute path; no: nowhere. See "
    "`upcall log`.  [default: as [log] in the configuration says, or no]",
)
@TRACEBACK
def command(
    runtime: Path | None,
    prove_all: bool,
    isolate: tuple[str, ...],
    inline: tuple[str, ...],
    pin_time: float,
    prompt_time: float,
    pinentry: str | None,
    ask: str,
    log_requests: str | None,
    show_traceback: bool,
) -> None:
    """Run this user's daemon: it answers the broker with this user's keys.

    It registers with this user's own broker, otherwise with the system's, and again when the broker restarts. A
    newer daemon of the same user replaces an older one, and says so on standard error. It runs in the foreground
    until SIGTERM or SIGINT, and answers the pending requests before it ends.

    If there is a system user `upcall`, it runs the machine's daemon; root's daemon then uses root's keys only, and
    has no network.

    At its start it adds the keys that are marked by `upcall key auto` to the user keyring. Keys may need a PIN or a
    passphrase: see `upcall prompt`.

    A key module that loads foreign libraries runs in a process of its own, where a crash or a hang affects that
    module only. A module that [plugins] allow in the configuration does not name is never loaded; SIGHUP and
    `upcall config reload` make the daemon read a changed configuration.

    \b
    Exit codes: 0 ended by a signal; 69 it could not start; 75 a newer daemon of this user took over; 78 other
    users could change what root would run, or the configuration is invalid.

    \b
    Examples:
      $ upcall daemon
      $ upcall daemon --isolate openssl --pin-time 0
    """
    ways = tuple(filter(None, ask.split(",")))
    if unknown := sorted(set(ways) - set(WAYS)):
        raise UsageError(f"--ask {unknown[0]}: there are {', '.join(WAYS)}")
    settings = DaemonSettings(
        None if runtime is None else runtime.absolute(),
        prove_all,
        check_where(wanted(log_requests, user=True)),
        found(Overrides(isolate, inline)),
        locks(),
        PromptSettings(ways, pinentry, min(pin_time, _FOREVER), prompt_time),
        _hardening()._replace(network=not keys_only()),
        add_auto_keys(),
        mounts_directory(),
        show_traceback,
    )
    _tell_of_another(runtime)
    # Not as text: all users can read arguments, and the settings name keys and files.
    command = startpython.command("upcall.daemon", handed_over(settings))
    os.execve(command[0], command, startpython.cleaned())  # noqa: S606


def _tell_of_another(runtime: Path | None) -> None:
    """Says which daemon of this user the new one replaces, if the broker that it will find has one."""
    from upcall.process.connection import BrokerConnection

    with (
        contextlib.suppress(UpcallError, OSError, KeyError, TypeError),
        BrokerConnection(runtime, timeout=2.0) as broker,
    ):
        for other in broker.status()["daemons"]:
            if other["uid"] == os.geteuid() and not other["leaving"]:
                output.note(f"this daemon replaces the daemon with pid {other['pid']}, which ends")


def _hardening() -> DaemonHardening:
    """Returns the configured hardening. ConfigError."""
    table = config.settings("hardening", user=True)
    if not table.get("daemon", True):
        return DaemonHardening(wanted=False)
    return DaemonHardening(writable=tuple(sorted(Path(place).expanduser() for place in table.get("writable", ()))))
