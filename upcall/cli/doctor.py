"""`upcall doctor`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from pathlib import Path

import click

from upcall.cli import for_terminal, output
from upcall.cli.parameter_types import runtime_option
from upcall.kernel import procfs
from upcall.observe.doctor.findings import NOTE, OK, PROBLEM, Finding
from upcall.observe.doctor.system import Scene
from upcall.observe.doctor.table import Check, examine

_MARKS = {OK: "✓", NOTE: "-", PROBLEM: "✗"}
_ROOTS = (  # how commands begin that root must run
    "/etc/init.d/",
    "apt ",
    "apt-get ",
    "chown ",
    "chroot ",
    "cp ",
    "mknod ",
    "modprobe ",
    "rm /dev/",
    "sysctl ",
    "systemctl ",
    "upcall request-key install",
    "upcall setup",
)
_COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@runtime_option()
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/",
    help="Look for request-key's configuration and programs below this folder.",
)
@click.pass_context
def command(ctx: click.Context, as_json: bool, runtime: Path | None, root: Path) -> None:
    """Check the whole installation: kernel, broker, your daemon, keys, plugins, configuration.

    Prints problems (✗), notes (-) and the commands that help: after $, or after # if root must run them. Nothing is
    changed. Run it as yourself for your daemon and keys, and as root for the system's part.

    With --quiet, only problems are printed. `upcall lab doctor` checks what the virtual machine for tests needs.

    \b
    Exit codes: 0 no problem was found; 1 there is one at least.

    \b
    Examples:
      $ upcall doctor
      # upcall doctor --quiet
    """
    found = []
    for check, finding in examine(Scene(runtime, root)):
        found.append((check, finding))
        if not as_json and (finding.state == PROBLEM or not output.quiet()):
            _print(check, finding)
    problems = sum(finding.state == PROBLEM for _, finding in found)
    if as_json:
        click.echo(json.dumps([{"check": check.name, **finding.report()} for check, finding in found], indent=2))
    elif not output.quiet():
        click.echo(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problems")
    ctx.exit(1 if problems else 0)


def _print(check: Check, finding: Finding) -> None:
    mark = click.style(_MARKS[finding.state], fg=_COLOURS[finding.state])
    click.echo(f"{mark} {check.name}: {for_terminal(finding.what)}")
    if finding.remedy:
        click.echo(f"    {for_terminal(finding.remedy)}")
    if finding.command:
        click.echo(f"    {_shell(finding.command)} {for_terminal(finding.command)}")


def _shell(command: str) -> str:
    """Returns the prompt before a command: # if root must run it, $ otherwise."""
    needs_root = (command.startswith(_ROOTS) and " --user " not in command) or _is_on_anothers(command)
    return "#" if needs_root or os.geteuid() == 0 else "$"


def _is_on_anothers(command: str) -> bool:
    """Returns whether a command changes a file, or signals a process, of another user."""
    program, *words = shlex.split(command)
    owner = None
    if program == "kill":
        owner = procfs.real_uid(int(words[-1]))
    elif program in ("chmod", "mv"):
        path = Path(next(filter(os.path.isabs, words), "."))
        with contextlib.suppress(OSError):
            owner = (path.parent if program == "mv" else path).stat().st_uid
    return owner is not None and owner != os.geteuid()
