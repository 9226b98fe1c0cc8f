"""`upcall key rename` and `upcall key resume`."""

from __future__ import annotations

import os

import click

from upcall.cli import completing, error_text, output
from upcall.cli.keychange import changing
from upcall.cli.keychange import resume as resume_one
from upcall.core.errors import UpcallError
from upcall.keys.replacing import leftovers
from upcall.keys.store import KeyStore, check_name


@click.command(short_help="Give a key another name.")
@click.argument("name", shell_complete=completing.keys)
@click.argument("new")
def rename(name: str, new: str) -> None:
    """Give the key NAME (or with this signature) the name NEW, in one step.

    Nothing else changes: signature, auth token, passphrase and key file, whose name stays, too.

    \b
    Exit codes: 0; 64 there is no such key, or NEW cannot be a name; 73 NEW is in use; 75 another command is changing
    the keys.

    \b
    Examples:
      $ upcall key rename default work
    """
    check_name(new)
    store = KeyStore()
    old = store.find(name).name
    with changing(store, old):
        store.rename(old, new)
    output.done(f"{old} is {new} now")


@click.command(short_help="Finish or undo what an interrupted command has left.")
@click.pass_context
def resume(ctx: click.Context) -> None:
    """Finish or undo what a command that was killed has left behind; every command that changes keys does so, too.

    \b
    Exit codes: 0 nothing is left; 75 something cannot be resumed now: the line says why, and what to do.

    \b
    Examples:
      $ upcall key resume
    """
    store, failed = KeyStore(), False
    found = leftovers(store)
    if not found:
        output.done("nothing to do")
        return
    with store.changing():
        for left in leftovers(store):
            try:
                output.done(resume_one(store, left))
            except (UpcallError, OSError) as error:
                failed = True
                click.echo(f"upcall: {left.what}, and cannot be resumed: {error_text(error)}", err=True)
    ctx.exit(os.EX_TEMPFAIL if failed else 0)
