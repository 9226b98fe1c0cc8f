"""`upcall plugin new`: writes the project of a new plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from upcall.core.errors import UsageError
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP
from upcall.keys import plugins as modules
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.sink import GROUP as SINKS

_DEFAULT: Final = "dns_resolver"


@click.command("new", short_help="Create a plugin project that works, as a template.")
@click.argument("name")
@click.option("--handler", is_flag=True, help="A handler, which answers the kernel's requests for keys of one type.")
@click.option("--sink", is_flag=True, help="A sink, which delivers quota notices to users.")
@click.option(
    "--service",
    metavar="TYPE",
    help=f"What a handler answers: {', '.join(sorted(KEY_TYPES))}.  [default: {_DEFAULT}]",
)
@click.option("--folder", type=click.Path(path_type=Path), help="The folder to create.  [default: upcall-NAME]")
def command(name: str, handler: bool, sink: bool, service: str | None, folder: Path | None) -> None:
    """Create a plugin project called NAME, as a template: it works, and has tests.

    It is a key module, which wraps and unwraps keys, or a handler or a sink if that is asked for. What you have to
    write is marked; everything else may stay as it is.

    \b
    Exit codes: 0 it was written; 64 the name is taken, or not one; 73 the folder has files in it.

    \b
    Examples:
      $ upcall plugin new mine
      $ upcall plugin new --handler hosts --service dns_resolver
      $ upcall plugin new --sink diary
    """
    from upcall.testing.templates import HANDLER, KEY_MODULE, SINK, write_plugin

    if handler and sink:
        raise UsageError("--handler and --sink: a plugin is one of them")
    if service is not None and not handler:
        raise UsageError("--service is what a handler answers: it needs --handler")
    kind, group = (HANDLER, HANDLERS) if handler else (SINK, SINKS) if sink else (KEY_MODULE, GROUP)
    alias = (service or _DEFAULT) if handler else name
    taken = [plugin for plugin in modules.installed() if (plugin.group, plugin.alias) == (group, alias)]
    if taken and not handler:
        raise UsageError(f"the name {name!r} is taken: {taken[0].distribution} has it")
    folder = folder or Path(f"upcall-{name}")
    for path in write_plugin(name, folder, kind, alias if handler else ""):
        click.echo(path)
    check = f"upcall plugin check {alias}" + (f" --param file=/tmp/{name}" if sink else "")
    click.echo(f"now: cd {folder} && pip install -e '.[test]' && python -m pytest && {check}", err=True)
    if taken:
        click.echo(f"{taken[0].distribution} answers {alias!r} here: uninstall it before you install yours", err=True)
