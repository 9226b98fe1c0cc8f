"""Prints the output of the lab's demonstrations."""

from __future__ import annotations

from rich.console import Console

from upcall.core.errors import UpcallError

console = Console(highlight=False)


class Failed(UpcallError):
    """A check of a demonstration has failed."""


def say(text: str) -> None:
    console.print(f"[green]✓[/] {text}")


def complain(error: BaseException) -> None:
    console.print(f"[red]✗[/] {error}")


def must(true: bool, what: str) -> None:
    if not true:
        raise Failed(what)
