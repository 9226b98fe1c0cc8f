"""`upcall plugin`: lists and shows plugins. Checking and creating them: plugincheck.py, pluginnew.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from upcall import config
from upcall.cli import completing, output, plugincheck, pluginnew
from upcall.cli.commands import Group
from upcall.cli.output import Column
from upcall.cli.plugincheck import KINDS, allowed_plugin
from upcall.cli.tracebacks import traceback_option
from upcall.keymodule import GROUP, KeyImporter, KeyMaker, KeyModule, Parameter
from upcall.keys import plugins as modules
from upcall.sink import GROUP as SINKS

_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
_NAME = click.argument("name", shell_complete=completing.plugins)


@click.group(cls=Group)
def command() -> None:
    """List, show, check and create plugins: key modules, handlers of messages, and sinks of notices."""


# --- list and show ---------------------------------------------------------------------------------------------


@command.command("list")
@_JSON
def list_plugins(as_json: bool) -> None:
    """List the plugins that are installed. None of them is loaded for this."""
    configured = config.load()
    rows = [_row(plugin, configured) for plugin in modules.installed()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _row(plugin: modules.Installed, configured: config.Config) -> dict[str, Any]:
    return {
        "name": plugin.alias,
        "kind": KINDS[plugin.group],
        "distribution": plugin.distribution,
        "version": plugin.version,
        "spec": plugin.spec,
        "isolated": plugin.isolated,
        "allowed": configured.allows(plugin.alias),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("no plugins are installed", err=True)
        return
    columns = (
        "name",
        "kind",
        Column("distribution", optional=True),
        Column("spec", optional=True),
        Column("isolated", optional=True),
        "allowed",
    )
    lines = []
    for row in rows:
        words = [row["name"], row["kind"], f"{row['distribution']} {row['version']}", row["spec"]]
        lines.append([*words, *("yes" if row[key] else "no" for key in ("isolated", "allowed"))])
    output.table(columns, lines)


@command.command(short_help="Load a plugin, and show what it can do.")
@_NAME
@_JSON
@traceback_option
def show(name: str, as_json: bool) -> None:
    """Load the plugin NAME, and show what it can do and what can be chosen."""
    plugin, configured = allowed_plugin(name), config.load()
    told = _row(plugin, configured)
    if plugin.group == GROUP:
        told |= _key_module(modules.load(plugin.spec))
    elif plugin.group == SINKS:
        modules.load_sink(plugin.spec, name)
    else:
        handler = modules.load_handler(plugin.spec, name)
        told |= {"services": list(handler.services)}
    told["file"] = getattr(sys.modules.get(plugin.spec.partition(":")[0]), "__file__", None)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        _print_plugin(told)


def _key_module(module: KeyModule) -> dict[str, Any]:
    told: dict[str, Any] = {"api": module.api, "powers": ["open"]}
    if isinstance(module, KeyMaker):
        told["powers"].append("generate")
        told["suffix"], told["takes_passphrase"] = module.suffix, module.takes_passphrase
        told["parameters"] = [_parameter(one) for one in module.parameters]
    if isinstance(module, KeyImporter):
        told["powers"].append("import")
        told["import_parameters"] = [_parameter(one) for one in module.import_parameters]
    return told


def _parameter(one: Parameter) -> dict[str, Any]:
    return {**one._asdict(), "choices": list(one.choices)}


def _print_plugin(told: dict[str, Any]) -> None:
    title = f"{told['name']}  {told['kind']}, {told['distribution']} {told['version']}"
    lines = [(key, told[key]) for key in ("spec", "file", "api", "powers", "services", "suffix") if told.get(key)]
    lines += [("isolated", "yes" if told["isolated"] else "no")]
    lines += [("passphrase", "yes" if told["takes_passphrase"] else "no")] if "takes_passphrase" in told else []
    click.echo(title)
    for key, value in lines:
        shown = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"  {key:<12} {shown}")
    for key, head in (
        ("parameters", "upcall key generate --param"),
        ("import_parameters", "upcall key import --param"),
    ):
        if told.get(key):
            click.echo(f"  {head}")
            for one in told[key]:
                click.echo(f"    {one['name']:<12} {one['help']} {_choice(one)}".rstrip())


def _choice(one: dict[str, Any]) -> str:
    words = [" | ".join(one["choices"])] if one["choices"] else []
    words += ["asked for, unseen"] if one["secret"] else []
    default = one["default"]
    words += ["must be given"] if default is None else [f"default {default}"] if default else ["may be left out"]
    return f"[{'; '.join(words)}]"


command.add_command(plugincheck.command)
command.add_command(pluginnew.command)
