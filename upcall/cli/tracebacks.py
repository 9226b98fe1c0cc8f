"""Defines the option --traceback of commands that run plugins: for their authors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from upcall.core.errors import UpcallError


def traceback_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the option. If the command fails because of another exception, a plugin's, its traceback
    is printed first."""

    @functools.wraps(command)
    def with_traceback(show_traceback: bool, **rest: Any) -> Any:
        try:
            return command(**rest)
        except UpcallError as error:
            if show_traceback and error.__cause__ is not None:
                show(error.__cause__)
            raise

    return TRACEBACK(with_traceback)


TRACEBACK = click.option(
    "--traceback",
    "show_traceback",
    is_flag=True,
    help="Show the traceback of a plugin's exception on standard error: for its author. It may contain secrets.",
)


def show(error: BaseException | str) -> None:
    """Prints a traceback on standard error. `error`: the exception, or its traceback as text."""
    from traceback import format_exception  # rarely needed

    text = error if isinstance(error, str) else "".join(format_exception(error))
    click.echo(text.rstrip("\n"), err=True)
