"""Implements the command line. Each command is a module of its own, imported only when it is called, so that `upcall
status` does not load what `upcall lab` needs."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from upcall.cli.commands import Group, with_global_options
from upcall.cli.output import for_terminal as for_terminal
from upcall.cli.running import OutputClosed, interrupted, run
from upcall.cli.running import error_text as error_text
from upcall.cli.running import exit_code as exit_code

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module below upcall.cli, or module:attribute if that is not `command`; one line for --help)
    "broker": ("broker", "Run the message broker."),
    "daemon": ("daemon", "Run this user's daemon."),
    "status": ("status", "Show your keys and your daemon, and what the broker does."),
    "doctor": ("doctor", "Check the installation, and name the commands that help."),
    "log": ("log", "Show the outcome of each request, from logs or the journal."),
    "metrics": ("metrics", "Print or serve the broker's metrics for Prometheus."),
    "wrap": ("wrap:wrap", "Wrap a small key with one of yours."),
    "unwrap": ("wrap:unwrap", "Unwrap what `upcall wrap` wrapped."),
    "prompt": ("prompt", "Type the PINs and passphrases that keys need, in this terminal."),
    "lock": ("keylock:lock", "Lock your keys at once: passphrases and PINs are forgotten."),
    "unlock": ("keylock:unlock", "Let the daemon use locked keys again."),
    "key": ("key", "Make, import, add, list, show, lock, unlock and remove keys."),
    "request-key": ("requestkey", "Route the kernel's requests for keys to upcall."),
    "explain": ("explain", "Show how a request of the kernel's would be answered."),
    "config": ("config", "Show, check and reload the configuration."),
    "plugin": ("plugin", "List, show, check and create plugins."),
    "quota": ("quota", "Show quotas, watch warnings, and test their delivery."),
    "mount": ("mount:mount", "Mount an encrypted folder of yours, without root."),
    "umount": ("mount:umount", "Unmount one of your mounts."),
    "mounts": ("mount:mounts_command", "List your mounts, and forget one."),
    "ecryptfs": ("ecryptfs", "Inspect, decrypt and rewrap the lower files of eCryptfs."),
    "manual": ("manual", "Show a manual page, or write all of them."),
    "completion": ("completion", "Print completion scripts for bash, zsh and fish."),
    "setup": ("setup", "Install upcall's services on this machine, or remove them."),
    "session": ("session", "Start and end daemons with logins, for PAM without systemd."),
    "demo": ("demo", "Run a demonstration in a temporary folder."),
    "lab": ("lab", "Run commands on a real kernel in a virtual machine."),
}


@contextlib.contextmanager
def _before_click() -> Iterator[None]:
    """A context in which Ctrl-C and a closed pipe are kept from click, which would give them exit codes of its own."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(interrupted()) from None
    except BrokenPipeError as error:
        raise OutputClosed from error


class Program(Group):
    """The whole program: a group that imports its commands on first use."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the program, as click does; errors become a line on stderr and an exit code of sysexits.h."""

        def command() -> Any:
            return super(Program, self).main(args, prog_name, complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return command()
        sys.exit(run(command))

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        with _before_click():
            return super().make_context(info_name, args, *more, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def find(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        where, about = COMMANDS[name]
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
        """Runs the command. A result is no exit code: those are raised."""
        with _before_click():
            super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upcall")
def main() -> None:
    """Answer the kernel's upcalls in the user's own name.

    The kernel requests an eCryptfs key, a Kerberos ticket or a name. The broker routes the request to the daemon of
    the user concerned, and the answer back. `upcall doctor` checks this machine and names the commands that help.

    \b
    Examples:
      # upcall setup
      $ upcall doctor
      $ upcall key generate
      $ upcall status
    """


with_global_options(main)
