"""`upcall plugin`: lists, shows and checks plugins, and creates new ones."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from upcall import config
from upcall.cli import completing, output
from upcall.cli.commands import Group
from upcall.cli.output import Column
from upcall.cli.parameters import ParameterWords, gather, parameter_options
from upcall.core.errors import UsageError
from upcall.core.suggestion import did_you_mean
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP, KeyImporter, KeyMaker, KeyModule, Parameter
from upcall.keys import plugins as modules
from upcall.sink import GROUP as SINKS

_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
_NEW = click.argument("name")
_NAME = click.argument("name", shell_complete=completing.plugins)
_KINDS = {GROUP: "key module", HANDLERS: "handler", SINKS: "sink"}
_MARKS = {"kept": "✓", "broken": "✗", "left out": "-"}


@click.group(cls=Group)
def command() -> None:
    """List, show, check and start plugins: key modules, handlers of messages, and sinks of notices."""


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
        "kind": _KINDS[plugin.group],
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
def show(name: str, as_json: bool) -> None:
    """Load the plugin NAME, and show what it can do and what can be chosen."""
    plugin, configured = _find(name), config.load()
    told = _row(plugin, configured)
    if plugin.group == GROUP:
        told |= _key_module(modules.load(plugin.spec))
    elif plugin.group == SINKS:
        modules.load_sink(plugin.spec, name)
    else:
        handler = _load_handler(plugin.spec)
        told |= {"services": list(handler.services)}
    told["file"] = getattr(sys.modules.get(plugin.spec.partition(":")[0]), "__file__", None)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        _print_plugin(told)


def _find(name: str) -> modules.Installed:
    """Finds a plugin by name. UsageError if it is not installed, or not allowed."""
    found = {plugin.alias: plugin for plugin in reversed(modules.installed())}  # key modules first
    if name not in found:
        suggested = did_you_mean(name, found)
        raise UsageError(f"there is no plugin '{name}'{suggested or ': `upcall plugin list` lists them'}")
    configured = config.load()
    if not configured.allows(name):
        raise UsageError(configured.refusal(name))
    return found[name]


def _load_handler(spec: str) -> Any:
    package, _, attribute = spec.partition(":")
    try:
        return getattr(importlib.import_module(package), attribute)
    except Exception as error:  # importing runs a plugin's code, which may raise anything
        raise UsageError(f"handler {spec}: {type(error).__name__}: {error}") from error


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


# --- check -----------------------------------------------------------------------------------------------------


@command.command(short_help="Check whether a key module keeps the contract.")
@_NAME
@parameter_options
@click.option(
    "--isolated/--inline", default=None, help="In a process of its own, or in ours.  [default: as installed]"
)
@click.option("--import", "importing", is_flag=True, help="Check a key that exists, instead of making one.")
@click.option("--file", type=click.Path(path_type=Path, exists=True), help="The key file to import; implies --import.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Whose passphrase is in this file.")
@click.option("--pin-file", type=click.Path(path_type=Path), help="The token's PIN, if a throw-away one does not fit.")
@click.option("--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="For each check.")
@_JSON
def check(name: str, told: ParameterWords, isolated: bool | None, as_json: bool, **rest: Any) -> None:
    """Check whether the key module NAME keeps the contract of key modules.

    It makes a key in a temporary folder, with a throw-away passphrase or PIN, and tries it in every way that the
    daemon, the kernel and bad luck might. What it needs to be told is said with --param. One that makes no keys is
    given one with --import, or with --param signature=... --param blob=HEX.

    \b
    ✓ kept   ✗ broken   - does not apply
    Exit codes: 0 all checks are kept; 1 one is not.

    \b
    Examples:
      $ upcall plugin check openssl
    """
    plugin = _find(name)
    if plugin.group != GROUP:
        raise UsageError(f"{name!r} is a {_KINDS[plugin.group]}: there is a contract of key modules only")
    verdicts = list(_checked(plugin, told, isolated, as_json, **rest))
    broken = sum(verdict["outcome"] == "broken" for verdict in verdicts)
    left_out = sum(verdict["outcome"] == "left out" for verdict in verdicts)
    if as_json:
        click.echo(json.dumps(verdicts, indent=2))
    else:
        kept = len(verdicts) - broken - left_out
        click.echo(f"{name}: {kept} kept, {broken} broken, {left_out} do not apply")
    sys.exit(1 if broken else os.EX_OK)


def _checked(plugin: modules.Installed, told: ParameterWords, isolated: bool | None, quiet: bool, **rest: Any) -> Any:
    from upcall.testing.checking import Order, check_module
    from upcall.testing.subject import PASSPHRASE, PIN

    importing = rest["importing"] or rest["file"] is not None
    order = Order(
        plugin.alias,
        plugin.spec,
        plugin.isolated if isolated is None else isolated,
        _values(plugin, told, importing),
        str(rest["file"].absolute()) if rest["file"] else "",
        importing,
        _secret(rest["passphrase_file"], PASSPHRASE),
        _secret(rest["pin_file"], PIN),
        rest["timeout"],
    )
    for verdict in check_module(order):
        if not quiet:
            why = f": {verdict.why}" if verdict.why else ""
            click.echo(f"{_MARKS[verdict.outcome]} {verdict.check.replace('_', ' ')}{why}")
        yield verdict._asdict()


def _values(plugin: modules.Installed, told: ParameterWords, importing: bool) -> dict[str, str]:
    """Returns parameter values by name; {} if none were given: then the module need not be loaded in this process."""
    if not any(told):
        return {}
    module = modules.load(plugin.spec)
    if isinstance(module, KeyMaker) and not importing:
        return gather(module.parameters, told)
    if isinstance(module, KeyImporter):
        return gather(module.import_parameters, told)
    return gather((Parameter("signature", "Of the key."), Parameter("blob", "In hexadecimal.")), told)


def _secret(path: Path | None, throw_away: bytes) -> str:
    from upcall.keys.passphrase import from_file

    return (throw_away if path is None else from_file(path.absolute())).decode()


# --- new -------------------------------------------------------------------------------------------------------


@command.command(short_help="Write a new plugin project that works, to be changed.")
@_NEW
@click.option("--folder", type=click.Path(path_type=Path), help="Where to.  [default: upcall-NAME]")
def new(name: str, folder: Path | None) -> None:
    """Write a new plugin project: a key module called NAME that works, with its tests, for you to change.

    Its two verbs are marked; everything else may stay as it is.

    \b
    Examples:
      $ upcall plugin new mine
    """
    from upcall.testing.templates import write_plugin

    if taken := [plugin for plugin in modules.installed() if plugin.alias == name]:
        raise UsageError(f"the name {name!r} is taken: {taken[0].distribution} has it")
    folder = folder or Path(f"upcall-{name}")
    for path in write_plugin(name, folder):
        click.echo(path)
    click.echo(
        f"now: cd {folder} && pip install -e '.[test]' && python -m pytest && upcall plugin check {name}", err=True
    )
