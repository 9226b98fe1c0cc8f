"""Implements the command line. Each command is a module of its own, imported only when it is called, so that `upcall
status` does not load what `upcall lab` needs."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import click

from upcall.core.errors import ModuleFailed, UpcallError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module below upcall.cli, or module:attribute if that is not `command`; one line for --help)
    "broker": ("broker", "Run the message broker."),
    "daemon": ("daemon", "Run this user's daemon."),
    "status": ("status", "Show what the broker does."),
    "doctor": ("doctor", "Check the whole installation, and say what to do."),
    "log": ("log", "Show what became of each request, from logs or the journal."),
    "metrics": ("metrics", "Print or serve the broker's figures for Prometheus."),
    "wrap": ("wrap:wrap", "Wrap a small key with one of yours."),
    "unwrap": ("wrap:unwrap", "Unwrap what `upcall wrap` gave."),
    "prompt": ("prompt", "Type the PINs and passphrases that keys need, in this terminal."),
    "lock": ("keylock:lock", "Lock your keys at once: passphrases and PINs are forgotten."),
    "unlock": ("keylock:unlock", "Let the daemon use them again."),
    "key": ("key", "Make, import, add, list, show, lock, unlock and remove keys."),
    "request-key": ("requestkey", "Have the kernel's requests for keys come to upcall."),
    "explain": ("explain", "Tell what would become of a key that the kernel asks for."),
    "config": ("config", "Show and check the configuration, and have it read again."),
    "plugin": ("plugin", "List, show, check and start plugins."),
    "quota": ("quota", "Show quotas, watch warnings, and test whether they arrive."),
    "ecryptfs": ("ecryptfs", "Look at eCryptfs files from below."),
    "manual": ("manual", "Show a manual page, or write all of them."),
    "completion": ("completion", "Print what makes bash, zsh or fish complete commands and names."),
    "setup": ("setup", "Set up this machine's services, or take them away."),
    "session": ("session", "Count logins, where there is no systemd: for PAM."),
    "demo": ("demo", "Show everything at work, in a temporary folder."),
    "lab": ("lab", "Run things on a real kernel in a virtual machine."),
}


# Exit codes of sysexits.h, by the name of the error's class: avoids importing the classes.
_CODES = {
    "FileNotFoundError": os.EX_NOINPUT,
    "FileExistsError": os.EX_CANTCREAT,
    "PermissionError": os.EX_NOPERM,
    "UsageError": os.EX_USAGE,
    "PeerError": os.EX_DATAERR,
    "ModuleFailed": os.EX_DATAERR,
    "Refused": os.EX_TEMPFAIL,
    "NoBroker": os.EX_UNAVAILABLE,
    "TimedOut": os.EX_TEMPFAIL,
    "NoDaemon": os.EX_UNAVAILABLE,
    "NoJournal": os.EX_UNAVAILABLE,
    "NoPassphrase": os.EX_UNAVAILABLE,
    "ConfigError": os.EX_CONFIG,
    "BadLine": os.EX_CONFIG,
    "OrderFailed": os.EX_OSERR,
    "OSError": os.EX_OSERR,
    "UpcallError": os.EX_SOFTWARE,
}


def exit_code(error: BaseException) -> int:
    """Returns the exit code for a command that failed with this error."""
    cause = error.__cause__
    if isinstance(error, UsageError | ModuleFailed) and isinstance(cause, OSError):
        error = cause  # the cause is more specific: a file that could not be opened
    return next((_CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _CODES), 1)


class LazyGroup(click.Group):
    """A click group that imports its commands on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        where, about = COMMANDS[cmd_name]
        module, _, attribute = where.partition(":")
        found = getattr(importlib.import_module(f"upcall.cli.{module}"), attribute or "command")
        if not isinstance(found, click.Command):
            return None
        found.short_help = about
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes from the table only: click would import every command for its help."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=about) for name, (_, about) in COMMANDS.items()]
        fitting = [item for item in found if item.value.startswith(incomplete)]
        return [*fitting, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Errors become a line on stderr and an exit code of sysexits.h."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            ctx.exit(os.EX_USAGE)
        except BrokenPipeError:
            raise  # click handles this: the reader of our output has closed the pipe
        except (UpcallError, OSError) as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
            ctx.exit(exit_code(error))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def error_text(error: UpcallError | OSError) -> str:
    """Returns the error as one line for people, with the file if it concerns one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def for_terminal(text: str) -> str:
    """Escapes control characters, so that text of others cannot inject escape sequences into a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upcall")
def main() -> None:
    """Answer the kernel's upcalls in the user's own name.

    The kernel asks (for an eCryptfs key, a Kerberos ticket, a name); the broker passes the question to the daemon of
    the user whom it concerns, and the answer back. `upcall doctor` says what is wrong on this machine, and what to do.

    \b
    Examples:
      # upcall setup
      $ upcall doctor
      $ upcall key generate
      $ upcall status
    """
