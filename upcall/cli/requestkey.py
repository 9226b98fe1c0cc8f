"""`upcall request-key`: installs, removes and checks upcall's lines in request-key's configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from upcall.cli import error_text, for_terminal
from upcall.cli.commands import Group
from upcall.core.errors import UpcallError
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.install.key_makers import Standing, standing, standing_of_type
from upcall.protocols.request_key.install.lines import Plan, check_winning, install, missing, others, plan, uninstall
from upcall.protocols.request_key.install.packages import command_to_install, is_packaged, lacks_package
from upcall.protocols.request_key.install.system import REQUEST_KEY, SOCKET, System
from upcall.protocols.request_key.key_types import KEY_TYPES

_DEFAULT = ("cifs.spnego",)
_ROOT = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/",
    help="The root folder of a system's image, which has the configuration and the programs.",
)


@click.group(cls=Group)
def command() -> None:
    """Route the kernel's requests for keys to upcall.

    The kernel starts /sbin/request-key (of keyutils), whose configuration names the program for each type of keys.
    """


@command.command("install", short_help="Have upcall answer requests for some types of keys.")
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice(list(KEY_TYPES)),
    help="A type of keys that upcall is to answer; may be repeated.  [default: as installed, or cifs.spnego]",
)
@click.option(
    "--copy/--no-copy",
    default=None,
    help="Run a copy of the program that only root can change; needed where upcall is installed in a "
    "user's folder.  [default: as installed, or --no-copy]",
)
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if something would have to be changed.")
@_ROOT
@click.pass_context
def install_command(ctx: click.Context, types: tuple[str, ...], copy: bool | None, check: bool, root: Path) -> None:
    """Write /etc/request-key.d/upcall.conf, whose lines take precedence over those of other packages.

    No other file is changed. It is refused if another line would still take precedence, if request-key cannot parse a
    line, if another program has written the file, or if users other than root could change the program. Debian's
    packages of handlers bring their own lines: with these, install the package of the type instead.

    \b
    Exit codes: 0 it is installed; 1 with --check: something would be changed; 73 another program has written the
    file; 77 root's privileges are needed; 78 another line takes precedence, or the program is not safe.

    \b
    Examples:
      # upcall request-key install
      # upcall request-key install --type cifs.spnego --type dns_resolver
    """
    system = System(root)
    if check:
        problems = _problems(system, types, copy)
        for problem in problems:
            click.echo(problem)
        ctx.exit(1 if problems else 0)
    planned = _plan(system, types, copy)
    for line in install(system, planned) or ["nothing to do"]:
        click.echo(line)
    _tell_others(system, planned.ours.types)
    for name in planned.ours.types:
        if lacks_package(system, name):
            click.echo(f"no handler for {name} is installed: `{command_to_install(system, [name])}`")
    if why := system.request_key():
        click.echo(f"{REQUEST_KEY} {why}")


def program() -> list[str]:
    """Returns the command for request-key's configuration, without the key."""
    from upcall.protocols.request_key import forwarder

    return forwarder.command()


def _plan(system: System, types: tuple[str, ...], copy: bool | None) -> Plan:
    current = system.ours()
    wanted = types or (current.types if current is not None else _DEFAULT)
    copied = current is not None and current.copied is not None
    return plan(system, wanted, program(), copied if copy is None else copy)


def _problems(system: System, types: tuple[str, ...], copy: bool | None) -> list[str]:
    try:
        planned = _plan(system, types, copy)
        check_winning(system, planned)
        return missing(system, planned)
    except (UpcallError, OSError) as error:
        return [error_text(error)]


def _tell_others(system: System, types: tuple[str, ...]) -> None:
    for name, line, keeps in others(system, types):
        pattern = line.columns[2].decode(errors="backslashreplace") if keeps else ""
        which = f"keeps {pattern}, for it is narrower" if keeps else "no longer used"
        click.echo(for_terminal(f"{line}: {name} by {line.program}: {which}"))


@command.command("uninstall", short_help="Remove what `install` wrote.")
@_ROOT
def uninstall_command(root: Path) -> None:
    """Remove what `upcall request-key install` wrote; then other packages' lines apply again.

    \b
    Exit codes: 0 it is not installed any more; 73 the file was edited, or another program has written it: it is
    kept; 77 root's privileges are needed.
    """
    for line in uninstall(System(root)) or ["nothing to do"]:
        click.echo(line)


@command.command("status", short_help="Show which programs answer the kernel's requests for keys.")
@click.option(
    "--key", nargs=2, metavar="TYPE DESCRIPTION", help="Show the program for this key.  [default: of each type]"
)
@click.option("--callout", default="", metavar="TEXT", help="The callout information of the request; only with --key.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@_ROOT
@click.pass_context
def status_command(ctx: click.Context, key: tuple[str, str] | None, callout: str, as_json: bool, root: Path) -> None:
    """Show which programs answer the kernel's requests for keys, and whether they can.

    \b
    Exit codes: 0 upcall answers (for this key, or for all types that it is installed for), and all that it needs
    is there; 1 it does not, or something is missing.

    \b
    Examples:
      $ upcall request-key status
      $ upcall request-key status --key cifs.spnego 'ver=0x2;host=fs.example'
    """
    system = System(root)
    report = _report(system, _key(*key, callout) if key else None)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
        if not (report["problem"] or report["installed"] or report["packaged"]):
            click.echo(f"upcall answers none of them: {_remedy(system)}")
    ctx.exit(0 if report["ready"] else 1)


def _key(*texts: str) -> RequestedKey:
    return RequestedKey(*map(os.fsencode, texts))


def _report(system: System, key: RequestedKey | None) -> dict[str, Any]:
    installed, packaged, problem = None, tuple[str, ...](), ""
    try:
        packaged = system.packaged()
        installed = system.ours()
    except OSError as error:
        problem = error_text(error)
    keys = [standing(system, key)] if key else [standing_of_type(system, name) for name in KEY_TYPES]
    wanted = {name.encode() for name in (*(installed.types if installed else ()), *packaged)}
    counted = [one for one in keys if key or one.key.type in wanted]
    request_key, socket = system.request_key(), system.socket()
    return {
        "ready": bool(counted) and all(map(_works, counted)) and not (problem or request_key or socket),
        "installed": None if installed is None else installed._asdict(),
        "packaged": packaged,
        "problem": problem,
        "keys": [one.report() for one in keys],
        "request-key": {"path": REQUEST_KEY, "problem": request_key},
        "socket": {"path": SOCKET, "problem": socket},
    }


def _works(one: Standing) -> bool:
    return one.ours and not one.problems


def _remedy(system: System) -> str:
    if is_packaged(system):
        return f"`{command_to_install(system, KEY_TYPES)}` as root"
    return "see `upcall request-key install`"


def _print(report: dict[str, Any]) -> None:
    for key in report["keys"]:
        line = key["line"]
        who = "upcall" if key["ours"] else "no program" if line is None else "not upcall"
        where = "" if line is None else f"  {line['file']}:{line['number']}  {line['program']}"
        click.echo(for_terminal(f"{key['type']:<14}{who:<12}{where}".rstrip()))
        for problem in key["problems"]:
            click.echo(for_terminal(f"  {problem}"))
    for one in (report["request-key"], report["socket"]):
        click.echo(f"{one['path']} {one['problem'] or 'is there'}")
    if report["problem"]:
        click.echo(report["problem"])
