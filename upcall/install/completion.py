"""What makes shells complete upcall's commands, and where it belongs."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import ShellComplete, get_completion_class

# Where the shells look for them, besides where distributions put theirs.
FILES: Final = {
    "bash": "/usr/local/share/bash-completion/completions/upcall",
    "zsh": "/usr/local/share/zsh/site-functions/_upcall",
    "fish": "/usr/local/share/fish/vendor_completions.d/upcall.fish",
}


def script(shell: str) -> str:
    """What makes the shell ask `upcall` itself."""
    found = get_completion_class(shell)
    if found is None:
        raise ValueError(shell)
    # Not bash's own source(): that starts a bash to see how old it is, and the script may be for another machine.
    text = ShellComplete.source(found(click.Command("upcall"), {}, "upcall", "_UPCALL_COMPLETE"))
    return text.strip() + "\n"
