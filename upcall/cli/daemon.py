"""`upcall daemon`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from upcall.modules import available


@click.command("daemon")
@click.option("--runtime", type=click.Path(file_okay=False, path_type=Path), help="The broker's folder.")
@click.option(
    "--prove-all",
    is_flag=True,
    help="Unwrap every wrapped key before it is answered, not only the first of each size: slower, and safe from a "
    "key module that goes bad later.",
)
def command(runtime: Path | None, prove_all: bool) -> None:
    """Run this user's daemon: it answers the broker with this user's keys.

    It looks for this user's own broker and then for the system's, and registers; when the broker restarts, it
    registers again. A newer daemon of the same user takes over from an older one. It runs in the foreground until
    SIGTERM or SIGINT, and answers what it holds before it ends.

    \b
    Exit codes: 0 ended as asked, or replaced; 69 it could not start.
    """
    arguments = [f"folder={runtime.absolute()}"] if runtime is not None else []
    arguments += ["prove=all"] if prove_all else []
    # Found here and handed over: importlib.metadata would double the daemon's start and cost it 5 MB.
    arguments += [f"module={alias}={spec}" for alias, spec in available().items()]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "upcall.daemon", *arguments])  # noqa: S606
