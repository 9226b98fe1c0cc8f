"""`upcall explain`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from upcall.cli import completing, for_terminal
from upcall.cli.parameter_types import UID, runtime_option
from upcall.cli.remedies import start_of_broker, start_of_daemon
from upcall.cli.tracebacks import TRACEBACK
from upcall.cli.tracebacks import show as show_trace
from upcall.core.errors import UsageError
from upcall.core.reasons import REASONS, in_words, remedy
from upcall.keys.plugins import handlers
from upcall.process.paths import SYSTEM_FOLDER
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.explain.steps import WOULD, explain
from upcall.protocols.request_key.install.packages import command_to_install, is_packaged, lacks_package
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_type import Option
from upcall.protocols.request_key.key_types import KEY_TYPES


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of all key types; an option of several types is added once."""
    of: dict[str, list[tuple[str, Option]]] = {}
    for key_type in KEY_TYPES.values():
        for option in key_type.options:
            of.setdefault(option.name, []).append((key_type.name, option))
    for name, those in reversed(of.items()):
        text = " ".join(f"{key_type}: {option.help}" for key_type, option in those)
        kind = UID if those[0][1].is_uid else str
        function = click.option(f"--{name}", type=kind, metavar=those[0][1].metavar, help=text)(function)
    return function


@click.command("explain")
@click.argument("service", metavar="TYPE", shell_complete=completing.key_types)
@_options
@click.option(
    "--contact", is_flag=True, help="Ask servers (KDC, DNS, name services), too: fetch what would be answered."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@TRACEBACK
@runtime_option("The broker's folder.  [default: the system's]")
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default="/", hidden=True)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    service: str,
    contact: bool,
    as_json: bool,
    show_traceback: bool,
    runtime: Path | None,
    root: Path,
    **told: Any,
) -> None:
    """Show what would be answered if the kernel asked for a key of TYPE, by which program, and why. No request is
    made.

    TYPE is a type of keys, such as cifs.spnego (a mount with sec=krb5) or dns_resolver. The user's handler looks
    for credentials in a process of that user, as the user's daemon would. No secret is shown. Only root may look at
    another user's credentials, and dns_resolver, id_resolver and cifs.idmap are answered with those of the
    machine's daemon.

    \b
    Exit codes: 0 upcall would answer; 1 it would not (the last lines say why, and what helps); 64 the kernel
    makes no such request; 77 root's privileges are needed.

    \b
    Examples:
      $ upcall explain cifs.spnego --host fs.example.com
      # upcall explain cifs.spnego --host fs.example.com --uid 1000 --contact
      # upcall explain dns_resolver --name fs.example.com
    """
    key = _key(service, {name: value for name, value in told.items() if value is not None})
    system = System(root)
    report = explain(key, runtime or SYSTEM_FOLDER, contact, system)
    report["remedy"] = _remedy(report, service, system)
    trace = report.get("handler", {}).pop("traceback", None)
    if show_traceback and isinstance(trace, str):
        show_trace("\n".join(map(for_terminal, trace.splitlines())))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for line in _lines(report):
            click.echo(line)
    ctx.exit(0 if report["answer"] == WOULD else 1)


def _key(service: str, told: dict[str, Any]) -> RequestedKey:
    if service not in KEY_TYPES:
        raise UsageError(f"no keys of type {service!r} are known: {', '.join(KEY_TYPES)}")
    key_type = KEY_TYPES[service]
    own = {option.name: str(os.getuid()) for option in key_type.options if option.is_uid}
    return key_type.key({**own, **{name: str(value) for name, value in told.items()}})


def _lines(report: dict[str, Any]) -> list[str]:
    """Formats a report: a block for each step, and the outcome."""
    line = report["request-key"]["line"]
    by = "no program" if line is None else f"{line['program']}, as {line['file']}:{line['number']} says"
    out = [*_pairs({"key": " ".join(filter(None, report["key"].values())), "made by": by}, "")]
    if "daemon" in report:
        daemon = report["daemon"]
        state = daemon["why"] or (f"pid {daemon['pid']}" if daemon["pid"] is not None else "")
        out += _pairs({"daemon": f"of uid {daemon['uid']}: {state}"}, "")
    if "handler" in report:
        handler = dict(report["handler"])
        out += _pairs({"handler": _said(handler.pop("answer"), handler.pop("why", "")), **handler}, "")
    words = report["why"] or (in_words(report["answer"]) if report["answer"] in REASONS else "")
    return out + _pairs({"answer": _said(report["answer"], words), "remedy": report["remedy"]}, "")


def _remedy(report: dict[str, Any], service: str, system: System) -> str:
    """Returns what helps, for the reason of a refusal or the answer of a step; "" if nothing needs help."""
    answer, line = report["answer"], report["request-key"]["line"]
    if answer in ("not-asked", "no-service"):
        install = f"`{command_to_install(system, [service])}` as root"
        status = "`upcall request-key status` shows what is in the way"
        if lacks_package(system, service):
            return install
        if answer == "not-asked":
            return status if line is not None and is_packaged(system) else f"{install}; {status}"
    if answer == "no-service" and service not in handlers():
        return f"install the plugin {KEY_TYPES[service].package}; `upcall plugin list` shows the installed ones"
    if answer == "no-broker":
        return f"start it: {start_of_broker()}"
    return remedy(answer, daemon=start_of_daemon()) if answer in REASONS else ""


def _said(answer: str, why: object) -> str:
    return f"{answer}: {why}" if why else answer


_DEEPEST = 8  # columns


def _pairs(told: dict[str, Any], indent: str) -> list[str]:
    """Formats one line for each value that is not empty; lists and objects are indented below their names, up to a
    limit."""
    out: list[str] = []
    for name, value in told.items():
        start = f"{indent}{for_terminal(str(name)):<12} "
        if len(indent) > _DEEPEST:
            out.append(f"{indent}...")
        elif isinstance(value, list) and value:
            out.append(start.rstrip())
            for one in value:
                out += _pairs(one if isinstance(one, dict) else {"-": str(one)}, indent + "  ")
        elif isinstance(value, dict):
            out += [start.rstrip(), *_pairs(value, indent + "  ")]
        elif value not in (None, "", []):
            out.append(start + for_terminal(_time(value) if name == "expires" else str(value)))
    return out


def _time(value: object) -> str:
    if not isinstance(value, int | float) or not 0 < value < 1 << 33:
        return str(value)
    return datetime.fromtimestamp(value).astimezone().isoformat(sep=" ")
