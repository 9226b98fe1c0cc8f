"""How commands print: tables, colours, verbosity, suggestions, and what a group says without a command."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from upcall.cli import main, output
from upcall.cli.commands import Group
from upcall.cli.output import Cell, Column, table_lines
from upcall.cli.passphrases import Given
from upcall.cli.secrets import CliSecrets
from upcall.core.suggestion import did_you_mean
from upcall.observe.tables import print_table

COLUMNS = (Column("name"), Column("size", right=True), Column("place", optional=True))
ROWS = (("one", "1", "/a/long/place/of/one"), (Cell("three", {"fg": "red"}), "1000", "/b"))


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yields the path and the command of every command, groups included."""
    ctx = click.Context(group, info_name="upcall")
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


TREE = dict(commands(main))
GROUPS = [path for path, command in TREE.items() if isinstance(command, click.Group)]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="upcall")


# --- groups and global options -----------------------------------------------------------------------------------


# `upcall mounts` lists, as `upcall mount` and `umount` do something.
NEEDING = [path for path in GROUPS if not getattr(TREE[path], "invoke_without_command", False)]


@pytest.mark.parametrize("path", [(), *NEEDING], ids=" ".join)
def test_a_group_without_a_command_shows_its_help_on_stderr_and_exits_64(path: tuple[str, ...]) -> None:
    done = run(*path)
    assert done.exit_code == os.EX_USAGE and not done.stdout
    assert done.stderr.startswith(f"Usage: {' '.join(('upcall', *path))}")


@pytest.mark.parametrize("path", GROUPS, ids=" ".join)
def test_every_group_suggests_commands(path: tuple[str, ...]) -> None:
    group = TREE[path]
    assert isinstance(group, Group)
    name = group.list_commands(click.Context(group))[0]
    done = run(*path, f"{name}x")
    assert done.exit_code == os.EX_USAGE and not done.stdout
    assert done.stderr.splitlines() == [
        f"upcall: there is no command '{name}x'; did you mean '{name}'?",
        f"Try `upcall {' '.join(path)} --help`.",
    ]


def test_an_unknown_command_of_the_program_gets_a_suggestion() -> None:
    assert "did you mean 'status'?" in run("stauts").stderr
    assert run("frobnicate").stderr.startswith("upcall: there is no command 'frobnicate'\n")


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_has_the_global_options_once(path: tuple[str, ...]) -> None:
    names = [name for one in TREE[path].params if isinstance(one, click.Option) for name in one.opts]
    for name in ("--color", "-q", "--quiet", "-v", "--verbose"):
        assert names.count(name) == 1


@pytest.mark.parametrize(
    "arguments",
    [("-q", "config", "show"), ("config", "-q", "show"), ("config", "show", "-q"), ("config", "show", "--quiet")],
    ids=" ".join,
)
def test_global_options_are_accepted_before_and_after_a_command(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == os.EX_OK
    assert output.quiet()


@pytest.mark.parametrize(
    ("arguments", "no_color", "coloured"),
    [
        ((), "", False),
        (("--color", "always"), "", True),
        (("--color", "always"), "1", True),
        (("--color", "never"), "", False),
        (("--color", "auto"), "", False),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_colours_are_as_the_option_says(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], no_color: str, coloured: bool, before: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    words = (*arguments, "config", "show") if before else ("config", "show", *arguments)
    done = CliRunner().invoke(main, words, color=None)  # type: ignore[arg-type]
    assert done.exit_code == os.EX_OK
    assert ("\x1b[" in done.stdout) == coloured


def test_no_color_is_for_terminals_too(monkeypatch: pytest.MonkeyPatch) -> None:
    output.reset()
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.colours() is None
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.colours() is False


# --- tables ------------------------------------------------------------------------------------------------------


def test_a_table_without_a_terminal_is_complete_and_one_line_for_each_row() -> None:
    rows = [("x" * 500, "1", "/y" * 500)]
    lines = [click.unstyle(line) for line in table_lines(COLUMNS, rows, None)]
    assert lines[0].split() == ["name", "size", "place"]
    assert lines[1].split() == list(rows[0])


def test_columns_are_aligned_and_coloured_cells_do_not_count() -> None:
    lines = [click.unstyle(line) for line in table_lines(COLUMNS, ROWS, 80)]
    assert lines == ["name   size  place", "one       1  /a/long/place/of/one", "three  1000  /b"]


def test_a_narrow_terminal_gets_fewer_columns() -> None:
    lines = [click.unstyle(line) for line in table_lines(COLUMNS, ROWS, 20)]
    assert lines == ["name   size", "one       1", "three  1000"]


def test_a_table_on_a_narrow_console_is_a_list_without_folded_cells() -> None:
    file = io.StringIO()
    print_table(Console(file=file, width=9, force_terminal=True, no_color=True), "title", COLUMNS, ROWS[:1])
    lines = click.unstyle(file.getvalue()).splitlines()
    assert lines == ["title", "name   one", "size   1", "place  /a/long/place/of/one"]


def test_a_terminal_too_narrow_for_that_gets_a_list() -> None:
    lines = [click.unstyle(line) for line in table_lines(COLUMNS, ROWS[:1], 9)]
    assert lines == ["name   one", "size   1", "place  /a/long/place/of/one"]


def test_wide_characters_count_twice() -> None:
    lines = table_lines(("a", "b"), [("日本", "x"), ("abcd", "y")], 80)
    assert [line[-1] for line in lines[1:]] == ["x", "y"] and lines[1] == "日本  x"


def test_control_characters_of_cells_are_escaped() -> None:
    assert table_lines(("a",), [("\x1b[2J\n",)], None)[1] == "\\x1b[2J\\n"


# --- suggestions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "end"), [("lisd", "; did you mean 'list'?"), ("zzz", ""), ("", ""), ("x" * 10000, "")]
)
def test_a_suggestion_is_made_for_what_is_close(name: str, end: str) -> None:
    assert did_you_mean(name, ["list", "show"]) == end


def test_a_missing_choice_is_refused_on_one_line_without_escapes() -> None:
    result = CliRunner().invoke(main, ["completion"])
    assert result.exit_code == os.EX_USAGE
    assert "Choose from: bash, zsh, fish" in result.stderr and "\\" not in result.stderr


def test_what_a_token_or_a_plugin_says_sends_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.reset()
    output.add_verbosity(1)
    CliSecrets(Given(None, None, False), "work", "0" * 16).touch("token", "touch \x1b]0;PWNED\a it")
    output.detail("caused by \x1b[2J")
    output.reset()
    assert capsys.readouterr().err == "upcall: touch \\x1b]0;PWNED\\x07 it\nupcall: caused by \\x1b[2J\n"
