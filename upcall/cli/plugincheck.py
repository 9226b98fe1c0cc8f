"""`upcall plugin check`: checks whether an installed plugin keeps its contract."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from upcall import config
from upcall.cli import completing
from upcall.cli.parameter_types import Seconds
from upcall.cli.parameters import ParameterWords, gather, parameter_options
from upcall.cli.tracebacks import TRACEBACK
from upcall.cli.tracebacks import show as show_trace
from upcall.core.errors import UsageError
from upcall.core.suggestion import did_you_mean
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP, KeyImporter, KeyMaker, Parameter
from upcall.keys import plugins as modules
from upcall.sink import GROUP as SINKS

if TYPE_CHECKING:
    from upcall.testing.checking import Order

KINDS: Final = {GROUP: "key module", HANDLERS: "handler", SINKS: "sink"}
_MARKS: Final = {"kept": "✓", "broken": "✗", "left out": "-"}
_LARGEST: Final = 65536  # bytes of a request: more than the longest body


def allowed_plugin(name: str) -> modules.Installed:
    """Finds an installed plugin by name. UsageError if there is none, or the configuration does not allow it."""
    found = {plugin.alias: plugin for plugin in reversed(modules.installed())}  # key modules first
    if name not in found:
        suggested = did_you_mean(name, found)
        raise UsageError(f"there is no plugin '{name}'{suggested or ': `upcall plugin list` lists them'}")
    configured = config.load()
    if not configured.allows(name):
        raise UsageError(configured.refusal(name))
    return found[name]


@click.command("check", short_help="Check whether a plugin meets its contract.")
@click.argument("name", shell_complete=completing.plugins)
@parameter_options
@click.option(
    "--isolated/--inline",
    default=None,
    help="A key module: in a process of its own, or in this one.  [default: as installed]",
)
@click.option("--import", "importing", is_flag=True, help="Check a key that exists, instead of making one.")
@click.option("--file", type=click.Path(path_type=Path, exists=True), help="The key file to import; implies --import.")
@click.option(
    "--passphrase-file", type=click.Path(path_type=Path), help="The passphrase of the key to import is in this file."
)
@click.option("--pin-file", type=click.Path(path_type=Path), help="The token's PIN, if a throw-away one does not fit.")
@click.option(
    "--request-file",
    type=click.Path(path_type=Path, exists=True),
    help="A handler: the body of a valid request.  [default: one that upcall knows]",
)
@click.option(
    "--timeout", type=Seconds(above=True), default=60.0, show_default=True, metavar="SECONDS", help="For each check."
)
@TRACEBACK
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def command(name: str, as_json: bool, show_traceback: bool, **rest: Any) -> None:
    """Check whether the plugin NAME meets the contract of its kind: key module, handler or sink.

    A key module makes a key in a temporary folder, with a throw-away passphrase or PIN. The key is used with valid,
    malformed and oversized input, by several threads, and after faults. Pass its required parameters with --param. One
    that makes no keys is given one with --import, or with --param signature=... --param blob=HEX.

    A handler gets valid and malformed requests. A sink is opened with your configuration's settings, or with those of
    --param, and gets test notices, which it delivers.

    \b
    ✓ passed   ✗ failed   - not applicable
    Exit codes: 0 no check has failed; 1 one has; 64 there is no such plugin.

    \b
    Examples:
      $ upcall plugin check openssl
      $ upcall plugin check dns_resolver --traceback
      $ upcall plugin check diary --param file=/tmp/diary
    """
    from upcall.testing.checking import check_plugin

    verdicts = []
    for verdict in check_plugin(_order(allowed_plugin(name), **rest)):
        row = verdict._asdict()
        trace = row.pop("trace")
        verdicts.append(row)
        if not as_json:
            why = f": {verdict.why}" if verdict.why else ""
            click.echo(f"{_MARKS[verdict.outcome]} {verdict.check.replace('_', ' ')}{why}")
        if show_traceback and trace:
            show_trace(trace)
    broken = sum(row["outcome"] == "broken" for row in verdicts)
    left_out = sum(row["outcome"] == "left out" for row in verdicts)
    if as_json:
        click.echo(json.dumps(verdicts, indent=2))
    else:
        kept = len(verdicts) - broken - left_out
        click.echo(f"{name}: {kept} passed, {broken} failed, {left_out} not applicable")
    sys.exit(1 if broken else os.EX_OK)


def _order(plugin: modules.Installed, told: ParameterWords, **rest: Any) -> Order:
    """Returns what is to be checked, and how. UsageError if an option does not fit the kind of plugin."""
    from upcall.testing.checking import Order

    order = Order(plugin.alias, plugin.spec, patience=rest["timeout"], group=plugin.group)
    of_keys = [name for name in _OF_KEY_MODULES if rest[name] not in (None, False)]
    if plugin.group != GROUP and of_keys:
        raise UsageError(
            f"{plugin.alias} is a {KINDS[plugin.group]}: {_OF_KEY_MODULES[of_keys[0]]} is for key modules"
        )
    if plugin.group != HANDLERS and rest["request_file"] is not None:
        raise UsageError(f"{plugin.alias} is a {KINDS[plugin.group]}: --request-file is for handlers")
    if plugin.group == HANDLERS:
        if any(told):
            raise UsageError(f"{plugin.alias} is a handler: it has no parameters")
        return order._replace(request=_request(plugin.alias, rest["request_file"]).hex())
    if plugin.group == SINKS:
        return order._replace(settings=_settings(plugin.alias, told))
    return _of_key_module(order, plugin, told, **rest)


_OF_KEY_MODULES: Final = {
    "isolated": "--isolated and --inline",
    "importing": "--import",
    "file": "--file",
    "passphrase_file": "--passphrase-file",
    "pin_file": "--pin-file",
}


def _of_key_module(order: Order, plugin: modules.Installed, told: ParameterWords, **rest: Any) -> Order:
    from upcall.testing.subject import PASSPHRASE, PIN

    importing = rest["importing"] or rest["file"] is not None
    return order._replace(
        isolated=plugin.isolated if rest["isolated"] is None else rest["isolated"],
        values=_values(plugin, told, importing),
        file=str(rest["file"].absolute()) if rest["file"] else "",
        importing=importing,
        passphrase=_secret(rest["passphrase_file"], PASSPHRASE),
        pin=_secret(rest["pin_file"], PIN),
    )


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


def _request(service: str, file: Path | None) -> bytes:
    """Returns the body of a request to a handler. UsageError if none is known."""
    if file is not None:
        with file.open("rb") as opened:
            body = opened.read(_LARGEST + 1)
        if len(body) > _LARGEST:
            raise UsageError(f"{file}: has more than {_LARGEST} bytes, the most that a request can have")
        return body
    from upcall.protocols.quota.notice import SERVICE, pack
    from upcall.protocols.request_key.key_types import KEY_TYPES
    from upcall.protocols.request_key.messages import Ask, pack_ask
    from upcall.testing.notices import notice

    if service == SERVICE:
        return pack(notice(os.getuid()))
    if service in KEY_TYPES:
        typical = KEY_TYPES[service].typical[0]
        return pack_ask(Ask(typical.description, typical.callout))
    raise UsageError(f"no request of the service {service!r} is known: name a file that holds one with --request-file")


def _settings(name: str, told: ParameterWords) -> dict[str, Any]:
    """Returns a sink's settings: those of the configuration, and over them what --param says. ConfigError."""
    if told.asked or told.fds or told.files:
        raise UsageError(f"{name} is a sink: its settings are given as --param NAME=VALUE")
    configured = config.settings("quota", user=True).get("sink", {}).get(name, {})
    return {**configured, **{key: _value(text) for key, text in told.plain.items()}}


def _value(text: str) -> Any:
    """Returns the value of a setting, written as in the configuration; what is not is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
