"""`upcall completion`."""

from __future__ import annotations

import click

from upcall.install.completion import FILES, script


@click.command("completion")
@click.argument("shell", type=click.Choice(list(FILES)))
def command(shell: str) -> None:
    """Print the script that makes bash, zsh or fish complete upcall's commands, options and names.

    `upcall setup` installs it where each SHELL finds it. Otherwise source it where your shell starts.

    \b
    Examples:
      $ source <(upcall completion bash)
      $ source <(upcall completion zsh)
      $ upcall completion fish | source
    """
    click.echo(script(shell), nl=False)
