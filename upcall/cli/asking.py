"""Asks a person before a command destroys something."""

from __future__ import annotations

import sys

import click

from upcall.core.errors import UsageError

_OPTION = "--yes"


def confirm(question: str) -> None:
    """Returns if a person answers yes; call it before anything is changed. Ends the command with 1 after a no.
    UsageError if standard input is no terminal: the answer must be given by --yes then."""
    if not sys.stdin.isatty():
        raise UsageError(f"no terminal to ask on, nothing was changed: {_OPTION} does it without asking")
    if not click.confirm(question, err=True):
        click.echo("upcall: nothing was changed", err=True)
        click.get_current_context().exit(1)
