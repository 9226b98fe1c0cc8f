"""`upcall session`."""

from __future__ import annotations

import os

import click

from upcall.cli.commands import Group
from upcall.process import start_python as startpython


@click.group("session", cls=Group)
def command() -> None:
    """Count logins: a daemon starts with a user's first session and ends with the last.

    For pam_exec(8), on machines without systemd; `upcall setup` writes the lines. PAM_TYPE and PAM_USER are read from
    the environment. It never makes a login fail, and delays it by two seconds at most. Errors are written to syslog
    (authpriv).

    \b
    Exit codes: 0; 64 not run by PAM, or not by root.
    """


def _run(*arguments: str) -> None:
    command = startpython.command("upcall.install.sessions", *arguments, isolated=True)
    os.execve(command[0], command, startpython.cleaned())  # noqa: S606


_ALSO = click.option(
    "--also", multiple=True, metavar="SERVICE", help="Count sessions of this PAM service, too: cron, atd."
)


@command.command("open", short_help="Count the start of a session.")
@_ALSO
def open_command(also: tuple[str, ...]) -> None:
    """Count the start of a session (type=open_session), and start the daemon with the first one."""
    _run("open", *(f"also={service}" for service in also))


@command.command("close", short_help="Count the end of a session.")
@_ALSO
def close_command(also: tuple[str, ...]) -> None:
    """Count the end of a session (type=close_session), and end the daemon with the last one."""
    _run("close", *(f"also={service}" for service in also))


@command.command("start", short_help="Start the daemon of a user who is not logged in.")
@click.argument("uid", type=click.IntRange(min=1))
def start_command(uid: int) -> None:
    """Start the daemon of the user UID, who need not be logged in.

    It ends when the program that asked for it has ended (the broker, see [daemon] start), and the user has no session.

    \b
    Exit codes: 0; 69 it could not be started.

    \b
    Examples:
      # upcall session start 1000
    """
    _run("start", str(uid))
