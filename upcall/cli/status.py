"""`upcall status`: the user's own keys and daemon first, then what the broker does."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from upcall.cli import output, personal
from upcall.cli.parameter_types import Seconds, runtime_option
from upcall.cli.remedies import start_of_daemon
from upcall.client import Client, NoBroker
from upcall.observe.status import show

_LOOK_AGAIN = 0.05  # seconds


@click.command("status")
@click.option("--all", "everything", is_flag=True, help="The broker's tables, too; root gets them in any case.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs; always everything.")
@runtime_option()
@click.option(
    "--wait",
    "patience",
    type=Seconds(),
    metavar="SECONDS",
    help="Wait until your own daemon is registered, and serves /dev/ecryptfs if there is one; at most this long.",
)
def command(everything: bool, as_json: bool, runtime: Path | None, patience: float | None) -> None:
    """Show the state of your keys and your daemon, and with --all what the broker does: daemons, contexts, outcomes,
    refusals. The broker shows your own uid, and root all uids.

    \b
    Exit codes: 0 shown; 69 there is no broker; 75 with --wait: there is no daemon.

    \b
    Examples:
      $ upcall status
      $ upcall status --all
      $ upcall status --json | jq .you
    """
    status: dict[str, Any] = {}
    missing: NoBroker | None = None
    try:
        status = _status(runtime) if patience is None else _once_served(runtime, os.getuid(), patience)
    except NoBroker as error:
        missing = error
    own = personal.look()
    if as_json:
        click.echo(json.dumps({"you": own, **(status or {"broker": None})}, indent=2))
    else:
        tables = bool(status) and (everything or os.geteuid() == 0)
        for line in personal.lines(own, status or None, tables):
            click.echo(line)
        if tables:
            show(status, output.console())
    if missing is not None:
        raise missing


def _status(runtime: Path | None) -> dict[str, Any]:
    with Client(runtime) as client:
        return client.status()


def _once_served(runtime: Path | None, uid: int, patience: float) -> dict[str, Any]:
    """Waits until this uid has a daemon, and returns the broker's status. Exits after `patience` seconds without
    one."""
    deadline = time.monotonic() + patience
    while True:
        try:
            status = _status(runtime)
        except NoBroker:
            if time.monotonic() >= deadline:
                raise
        else:
            if _serves(status, uid):
                return status
            if time.monotonic() >= deadline:
                click.echo(f"upcall: uid {uid} has no daemon; start it: {start_of_daemon()}", err=True)
                sys.exit(os.EX_TEMPFAIL)
        time.sleep(_LOOK_AGAIN)


def _serves(status: dict[str, Any], uid: int) -> bool:
    """Returns whether a uid's daemon serves all it can. A device that this kernel does not have is not needed."""
    devices = [
        one for one in status.get("devices", []) if one["uid"] == uid and "No such file" not in one.get("why", "")
    ]
    registered = any(one["uid"] == uid and not one["leaving"] for one in status["daemons"])
    return registered and all(one["open"] for one in devices)
