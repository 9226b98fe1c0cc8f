"""Generates the shells' completion scripts, and knows where they are installed."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import ShellComplete, get_completion_class

# Paths that the shells search in addition to those of distributions' packages.
FILES: Final = {
    "bash": "/usr/local/share/bash-completion/completions/upcall",
    "zsh": "/usr/local/share/zsh/site-functions/_upcall",
    "fish": "/usr/local/share/fish/vendor_completions.d/upcall.fish",
}


def script(shell: str) -> str:
    """Returns a script that makes the shell ask `upcall` for completions. ValueError for an unknown shell."""
    found = get_completion_class(shell)
    if found is None:
        raise ValueError(shell)
    # Not bash's own source(): it runs bash to check its version, and the script may be for another machine.
    text = ShellComplete.source(found(click.Command("upcall"), {}, "upcall", "_UPCALL_COMPLETE"))
    return text.strip() + "\n"
