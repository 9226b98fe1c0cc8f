"""Groups of commands, and the options that every command has.

--color, --quiet and --verbose may stand before and after each word of a command: `upcall -q key list` is `upcall key
list -q`. A group adds them to its commands when it looks one up, so that modules of commands need not know of them.
"""

from __future__ import annotations

from typing import Any

import click

from upcall.cli import output
from upcall.core.suggestion import did_you_mean


class Group(click.Group):
    """A group whose commands have the global options, which suggests a command for an unknown one, and which shows its
    help on standard error if no command is given."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **{"no_args_is_help": False, **attributes})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self.find(ctx, cmd_name)
        return None if found is None else with_global_options(found)

    def find(self, ctx: click.Context, name: str) -> click.Command | None:
        """Returns the command of this name; None if there is none. For subclasses that import commands."""
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            suggested = did_you_mean(name, self.list_commands(ctx))
            raise click.UsageError(f"there is no command '{output.for_terminal(name)}'{suggested}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        # The name of the command: click 8.2 has renamed this, and warns of the old name.
        chosen = vars(ctx).get("_protected_args") or vars(ctx).get("protected_args")
        if not (ctx.args or chosen or self.invoke_without_command):
            raise NoCommand(ctx)
        return super().invoke(ctx)


class NoCommand(click.UsageError):
    """A group was called without a command."""

    def __init__(self, ctx: click.Context) -> None:
        super().__init__("a command is missing", ctx)
        self.help = ctx.get_help()


class FilledPath(click.Path):
    """A path that is not empty: pathlib takes "" for the working directory, and a script with an unset variable would
    have it changed."""

    @classmethod
    def like(cls, kind: click.Path) -> FilledPath:
        """Returns the same type, but for that."""
        found = cls()
        vars(found).update(vars(kind))
        return found

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


def with_global_options(command: click.Command) -> click.Command:
    """Adds the global options to a command, unless it has them, and has it refuse empty paths. Returns the command."""
    names = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    for one in command.params:
        if type(one.type) is click.Path:
            one.type = FilledPath.like(one.type)
    command.params += [one for one in _GLOBAL if not names.intersection(one.opts)]
    return command


def _set_colour(ctx: click.Context, _option: click.Parameter, choice: str | None) -> None:
    if choice is not None:
        output.set_colour(choice)
    ctx.color = output.colours()


def _set_quiet(_ctx: click.Context, _option: click.Parameter, given: bool) -> None:
    output.add_verbosity(-1 if given else 0)


def _set_verbose(_ctx: click.Context, _option: click.Parameter, count: int) -> None:
    output.add_verbosity(count)


_GLOBAL = (
    click.Option(
        ["--color"],
        type=click.Choice(output.COLOURS),
        metavar="WHEN",
        expose_value=False,
        is_eager=True,
        callback=_set_colour,
        help="Print colours: auto (in a terminal, unless NO_COLOR is set), always, or never.",
    ),
    click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_quiet,
        help="Print results and errors only: no notes, no progress.",
    ),
    click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        is_eager=True,
        callback=_set_verbose,
        help="Print on standard error, too, which places were searched, and what caused an error.",
    ),
)
