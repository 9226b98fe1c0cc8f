"""The command line. Each command lives in a module of its own, imported only when it is called:
`upcall status` must not pay for what `upcall lab` needs."""

from __future__ import annotations

import importlib

import click

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module below upcall.cli, or module:attribute if that is not `command`; one line for --help)
    "broker": ("broker", "Run the message broker."),
    "daemon": ("daemon", "Run this user's daemon."),
    "status": ("status", "Show what the broker does."),
    "wrap": ("wrap:wrap", "Wrap a small key with one of yours."),
    "unwrap": ("wrap:unwrap", "Unwrap it again."),
    "lab": ("lab", "Run things on a real kernel in a virtual machine."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are first used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(f"upcall.cli.{module}"), attribute or "command")
        return found if isinstance(found, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upcall")
def main() -> None:
    """Answers the kernel's upcalls in the user's own name."""
