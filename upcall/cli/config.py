"""`upcall config`: shows the configuration with its origins, checks it, and reloads it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from upcall import config
from upcall.cli import completing, for_terminal, output
from upcall.cli.commands import Group
from upcall.cli.output import Cell, Column
from upcall.config.errors import ConfigError
from upcall.config.files import Source, folder_of
from upcall.config.layers import Said
from upcall.config.lines import spelled
from upcall.config.shown import Shown, effective, plain
from upcall.config.table import SYSTEM, USERS
from upcall.core.errors import UsageError
from upcall.core.suggestion import did_you_mean

_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")


@click.group(cls=Group)
def command() -> None:
    """Show and check the configuration, and have your daemon read it again."""


# --- show --------------------------------------------------------------------------------------------------------


@command.command("show", short_help="Show the effective values, and where they are set.")
@click.argument("name", required=False, metavar="[TABLE[.KEY]]", shell_complete=completing.config_names)
@click.option("--origin", is_flag=True, help="Where each value comes from: file and line.")
@click.option(
    "--user/--system",
    default=True,
    help="With your own files, or the system's only, as the broker.  [default: --user]",
)
@_JSON
def show(name: str | None, origin: bool, user: bool, as_json: bool) -> None:
    """Show the effective values: of all keys, of a TABLE, or of one KEY, with its description.

    \b
    Exit codes: 0 shown; 64 there is no such key; 78 a file is invalid: see `upcall config check`.

    \b
    Examples:
      $ upcall config show --origin
      $ upcall config show quota.thresholds
    """
    found = _named(name, list(effective(config.read(user))))
    if as_json:
        click.echo(json.dumps({one.name: _as_data(one) for one in found}, indent=2))
        return
    _print_values(found, origin)
    if len(found) == 1:
        key = found[0].key
        who = "only the system's files can set it" if key.scope == SYSTEM else "users can set it, too"
        click.echo(f"{key.about}\nWanted: {key.kind.wanted}; {who}.")


_SEE_ALL = ": `upcall config show` lists them"


def _named(name: str | None, found: list[Shown]) -> list[Shown]:
    if name is None:
        return found
    chosen = [one for one in found if name in _names(one)]
    if not chosen:
        names = {known for one in found for known in _names(one)}
        raise UsageError(f"there is no key or table '{name}'" + (did_you_mean(name, names) or _SEE_ALL))
    return chosen


def _names(one: Shown) -> set[str]:
    """Returns the names that select a key: its own and those of its tables; with or without the quotes of
    request-key."cifs.spnego"."""
    paths = [one.path[:count] for count in range(1, len(one.path) + 1)]
    return {spelled(path) for path in paths} | {".".join(path) for path in paths}


def _as_data(one: Shown) -> dict[str, Any]:
    return {
        "value": plain(one.value),
        "origin": [{"file": file, "line": line} for file, line in one.origin],
        "unset": one.key.unset or None,
        "scope": one.key.scope,
        "about": one.key.about,
    }


def _print_values(found: Sequence[Shown], origin: bool) -> None:
    rows = []
    for one in found:
        style = {} if one.origin else {"dim": True}
        row = [one.name, one.text(), *([one.where()] if origin else [])]
        rows.append([Cell(text, style) for text in row])
    output.table(["key", "value", *(["from"] if origin else [])], rows)


# --- check -------------------------------------------------------------------------------------------------------


@command.command("check", short_help="Check the files, and report every error.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--user/--system", default=None, help="FILE is a user's own, or the system's.  [default: by its place]")
@_JSON
def check(files: tuple[Path, ...], user: bool | None, as_json: bool) -> None:
    """Check every file of the configuration, or each FILE, and report every error.

    Without FILE: the vendor's, the system's and your own; with --system, not your own.

    \b
    Exit codes: 0 there is no error; 78 there is one at least.

    \b
    Examples:
      $ upcall config check
      $ upcall config check --system draft.toml
    """
    if files:
        looked = [Said(Source(file.absolute(), _scope(file, user))) for file in files]
    else:
        looked = config.look(user is not False)
    problems = [problem for said in looked for problem in _problems(said, given=bool(files))]
    if not files and not problems:
        problems = _of_the_broker()
    if as_json:
        click.echo(json.dumps(_report(looked, problems), indent=2))
    else:
        _print_checked(looked, problems)
        for problem in problems:
            click.echo(for_terminal(str(problem)), err=True)
    if problems:
        click.get_current_context().exit(os.EX_CONFIG)


def _scope(file: Path, user: bool | None) -> str:
    own = config.user_file()
    if user is None:
        user = file.absolute() == own or file.absolute().parent == folder_of(own)
    return USERS if user else SYSTEM


def _problems(said: Said, given: bool) -> list[ConfigError]:
    if given and not said.there and not said.problems:
        return [ConfigError(said.source.file, "is not there")]
    return said.problems


def _of_the_broker() -> list[ConfigError]:
    """Returns errors of valid values: users that do not exist."""
    from upcall.broker.settings import configured
    from upcall.protocols.catalogue import SERVICES

    try:
        configured(SERVICES)
    except ConfigError as error:
        return [error]
    return []


def _report(looked: Sequence[Said], problems: Sequence[ConfigError]) -> dict[str, Any]:
    return {
        "files": [
            {
                "file": str(said.source.file),
                "scope": said.source.scope,
                "there": said.there,
                "masked": None if said.source.masked is None else str(said.source.masked),
            }
            for said in looked
        ],
        "problems": [
            {"file": str(one.file), "line": one.line, "key": one.key or None, "why": one.why} for one in problems
        ],
    }


def _print_checked(looked: Sequence[Said], problems: Sequence[ConfigError]) -> None:
    rows: list[tuple[str, str, Cell]] = []
    for said in looked:
        source = said.source
        wrong = sum(one.file == source.file for one in problems)
        text, style = ("right", {"fg": "green"}) if said.there else ("not there", {"dim": True})
        if source.masked is not None:
            text, style = f"masked by {source.masked}", {"dim": True}
        if wrong:
            text, style = f"wrong: {wrong}", {"fg": "red"}
        rows.append((str(source.file), source.scope, Cell(text, style)))
    output.table(("file", Column("whose", optional=True), "state"), rows)


# --- reload ------------------------------------------------------------------------------------------------------


@command.command("reload", short_help="Have your daemon read the configuration again.")
def reload() -> None:
    """Have your daemon read the configuration again. Requests in progress are completed.

    `[plugins] allow` takes effect at once. The broker reads its configuration again on `systemctl reload
    upcall-broker`, or SIGHUP.

    \b
    Exit codes: 0 the daemon was signalled, and logs the outcome; 69 you have no daemon; 78 a file is invalid,
    and the daemon was not signalled.
    """
    config.read(user=True)
    from upcall.process.control import DaemonControl  # `show` and `check` need no daemon

    with DaemonControl() as daemon:
        daemon.reload()
