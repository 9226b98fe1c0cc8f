"""`upcall setup`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from upcall.cli import error_text, for_terminal, main
from upcall.config import ConfigError
from upcall.core.errors import UpcallError, UsageError
from upcall.install import packaged
from upcall.install.manifest import Manifest
from upcall.install.manual.written import written
from upcall.install.services import SetupPlan, install, kind_of, missing, undo
from upcall.install.wanted import KINDS
from upcall.process.debian import RECORD
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_types import KEY_TYPES

_DEFAULT = ("cifs.spnego",)


@click.command("setup")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if something would have to be changed.")
@click.option("--undo", "undoing", is_flag=True, help="Remove what `upcall setup` has made, and nothing else.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/",
    help="The root folder of a system's image, instead of this machine.",
)
@click.option(
    "--manager",
    type=click.Choice(list(KINDS)),
    help="How daemons start with logins.  [default: systemd where it runs, or is in the image]",
)
@click.option(
    "--python",
    default=sys.executable,
    metavar="PATH",
    help="The interpreter of that system that has upcall.  [default: the one that runs this]",
)
@click.option(
    "--request-key",
    "types",
    multiple=True,
    type=click.Choice([*KEY_TYPES, "none"]),
    help="A type of keys that upcall is to answer; may be repeated.  [default: cifs.spnego where keyutils is]",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def command(
    ctx: click.Context,
    check: bool,
    undoing: bool,
    root: Path,
    manager: str | None,
    python: str,
    types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Install upcall's services: a daemon starts with a user's first login and ends with the last logout.

    The broker and the machine's daemon run as services, the latter as the system user `upcall`, which is created,
    and kept by --undo; a daemon for root's keys runs if root has any. With systemd, users' daemons are units of
    their own managers; without it, PAM starts and ends them (Debian's pam-auth-update). Manual pages and completion
    for bash, zsh and fish are installed. Each change is printed. Files that upcall did not write are never
    overwritten; those that it wrote are recorded in /var/lib/upcall/install.json.

    Debian's package upcall sets the machine up by itself. With it, --check checks the package's files, and --undo
    removes only what an earlier `upcall setup` has made.

    \b
    Exit codes: 0 done, or nothing to do; 1 with --check: something is missing or different; 71 a program that it
    runs has failed; 73 a file belongs to another program, or was edited; 77 root's privileges are needed; 78
    users other than root could change what root would run.

    \b
    Examples:
      # upcall setup
      # upcall setup --check
      # upcall setup --undo
    """
    if check and undoing:
        raise UsageError("--check and --undo cannot both be meant")
    system = System(root)
    kind = KINDS[manager] if manager else kind_of(system.root)
    if (record := packaged.packaged(system)) is not None:
        lines, ready = _of_package(system, record, python, check, undoing)
    else:
        plan = SetupPlan(kind, python, _wanted(system, types), written(main))
        lines, ready = _checked(system, plan) if check else (undo(system) if undoing else install(system, plan), True)
    if as_json:
        click.echo(json.dumps({"manager": kind.name, "ready": ready, "lines": lines}, indent=2))
    else:
        for line in lines or ["nothing to do"]:
            click.echo(for_terminal(line))
    ctx.exit(0 if ready else 1)


def _of_package(system: System, record: Manifest, python: str, check: bool, undoing: bool) -> tuple[list[str], bool]:
    """Returns lines for people, and whether all is well, where a package has set up the machine. ConfigError if this
    is another upcall, which would set up a second one."""
    if undoing:
        return [*undo(system, packaged.orders(system)), "the package stays: apt-get remove upcall"], True
    if not check and not packaged.is_of_package(python):
        why = "Debian's package upcall has set up this machine: `apt-get remove upcall` comes first"
        raise ConfigError(system.at(RECORD), why)
    lines = packaged.missing(system, record)
    return (lines, False) if lines else (["nothing to do: the package upcall has set up this machine"], True)


def _wanted(system: System, types: tuple[str, ...]) -> tuple[str, ...]:
    if not types:
        return () if system.request_key() else _DEFAULT
    if "none" in types and len(types) > 1:
        raise UsageError("--request-key none: and another type, too?")
    return () if types == ("none",) else types


def _checked(system: System, plan: SetupPlan) -> tuple[list[str], bool]:
    try:
        lines = missing(system, plan)
    except (UpcallError, OSError) as error:
        return [error_text(error)], False
    return lines, not lines
