"""`upcall prompt`."""

from __future__ import annotations

import contextlib
import os
import signal

import click

from upcall.cli.output import for_terminal
from upcall.core.errors import UsageError


@click.command("prompt")
def command() -> None:
    """Answer the daemon's prompts for PINs and passphrases in this terminal.

    Keys in tokens (smart cards, TPMs) need a PIN from time to time. While this command runs, the daemon prompts
    here, and says which process needs the key. Ctrl-C, or an empty line, cancels a prompt; Ctrl-C between two
    prompts ends the command. A newer `upcall prompt` replaces an older one.

    \b
    Exit codes: 0 ended by Ctrl-C, or another terminal took over; 64 there is no terminal; 69 there is no daemon,
    it has ended, or it is configured not to prompt in terminals; 129 the terminal was closed.

    \b
    Examples:
      $ upcall prompt
    """
    from upcall.daemon.prompting.agent import REPLACED
    from upcall.daemon.prompting.terminal import Ended, Terminal, TerminalGone
    from upcall.keys.passphrase import TTY
    from upcall.process.control import DaemonControl, NoDaemon

    try:
        fd = os.open(TTY, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        raise UsageError("no terminal to ask on") from None
    with DaemonControl() as daemon, daemon.prompts() as connection:
        click.echo("PINs are asked for here. Ctrl-C ends this.", err=True)
        try:
            Terminal(fd, connection).run()
        except KeyboardInterrupt:
            click.echo(err=True)
        except TerminalGone:
            raise SystemExit(128 + signal.SIGHUP) from None  # SIGHUP may come later than the end of file
        except Ended as error:
            if str(error) != REPLACED:
                raise NoDaemon(str(error)) from None
            with contextlib.suppress(OSError):
                click.echo(f"upcall: {for_terminal(str(error))}", err=True)
