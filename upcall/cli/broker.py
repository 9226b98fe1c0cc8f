"""`upcall broker`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from upcall.broker.settings import BrokerSettings
from upcall.observe.recorder import check_where
from upcall.process import start_python as startpython
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.device import DEVICE


@click.command("broker")
@click.option(
    "--runtime",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the sockets.  [default: /run/upcall, or in your own runtime folder]",
)
@click.option(
    "--ecryptfs/--no-ecryptfs", default=None, help="Serve /dev/ecryptfs, or do not.  [default: if run by root]"
)
@click.option(
    "--contexts",
    type=click.IntRange(4, 4096),
    help="Message contexts of each uid, for each service: how many requests can be pending.  [default: 32]",
)
@click.option("--quota/--no-quota", default=None, hidden=True)  # of versions in which the broker heard them itself
@click.option(
    "--log-requests",
    metavar="WHERE",
    help="Where to write a record of each request: stderr, journal, or a file's absolute path; no: nowhere. See "
    "`upcall log`.  [default: as [log] in the configuration says, or no]",
)
def command(
    runtime: Path | None, ecryptfs: bool | None, contexts: int | None, quota: bool | None, log_requests: str | None
) -> None:
    """Run the message broker: the system's as root, or one for your own uid.

    Root's broker serves every uid that has a daemon, and the kernel's eCryptfs for each of them. A user's broker
    serves that user's own processes. It runs in the foreground until SIGTERM or SIGINT, and then refuses the
    pending requests.

    \b
    Exit codes: 0 ended by a signal; 69 it could not start (the error names the conflicting process); 78 other
    users could change what root would run, or the configuration is invalid.

    \b
    Examples:
      # upcall broker
      $ upcall broker --runtime /tmp/mine --no-ecryptfs
    """
    if quota:
        about = "--quota does nothing here: quota warnings are heard by a process of its own, `upcall quota serve`"
        click.echo(f"upcall broker: {about} (upcall-quota.service)", err=True)
    settings = BrokerSettings(
        None if runtime is None else runtime.absolute(),
        DEVICE if ecryptfs or (ecryptfs is None and os.geteuid() == 0) else None,
        contexts,
        None if log_requests is None else check_where(log_requests),
    )
    command = startpython.command("upcall.broker", dumps(settings))
    os.execve(command[0], command, startpython.cleaned())  # noqa: S606
