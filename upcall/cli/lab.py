"""`upcall lab`: runs commands on a real kernel in a virtual machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import click

from upcall.cli.commands import Group
from upcall.cli.parameter_types import Seconds
from upcall.process import start_python as startpython
from upcall.testing.lab import image, machine
from upcall.testing.lab.carrier import Sink
from upcall.testing.lab.doctor import checks
from upcall.testing.lab.errors import LabError
from upcall.testing.lab.terminal import PseudoTerminal

EXIT_KERNEL_FAULT = os.EX_OSERR
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group(cls=Group)
def command() -> None:
    """Run commands on a real kernel in a virtual machine.

    The guest is Debian's own kernel in QEMU, with this machine's files under a scratch layer: it may write
    anywhere, and nothing of it reaches this machine but what it puts into /results. eCryptfs is loaded; the
    users alice (5001) and bob (5002) exist. It has no network.

    With --kernel uml it is User-mode Linux: an ordinary program, up in three seconds and far quicker, with one
    processor and without eCryptfs's messages."""


def timeout_option(default: float) -> Decorator:
    return click.option(
        "--timeout",
        type=Seconds(above=True),
        default=default,
        show_default=True,
        metavar="SECONDS",
        help="For the whole run, boot included.",
    )


memory_option = click.option(
    "--memory",
    type=click.IntRange(min=512),
    default=machine.MEMORY,
    show_default=True,
    metavar="MB",
    help="The guest's memory.",
)
cpus_option = click.option(
    "--cpus",
    type=click.IntRange(1, 16),
    metavar="N",
    help=f"The guest's processors: {machine.CPUS} if not given; User-mode Linux has one.",
)
kernel_option = click.option(
    "--kernel",
    type=click.Choice([*image.KERNELS]),
    default="qemu",
    show_default=True,
    help="Debian's own in QEMU, or User-mode Linux.",
)
results_option = click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the files from the guest's /results go, and the kernel's log as kmsg.",
)
log_option = click.option(
    "--kernel-log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the kernel's log to this file, too.",
)


@command.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@timeout_option(machine.TIME_LIMIT)
@kernel_option
@memory_option
@cpus_option
@results_option
@log_option
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGS]...")
def run(
    timeout: float,
    kernel: str,
    memory: int,
    cpus: int | None,
    results: Path | None,
    kernel_log: Path | None,
    argv: tuple[str, ...],
) -> None:
    """Run COMMAND in the guest as root.

    It runs in this folder, with this Python first in its PATH. The guest's /tmp is its own, and empty: a file from
    this machine's /tmp is not there. Its output and exit code are passed on; its input is
    empty. 71 means a fault of the guest's kernel although COMMAND succeeded, 75 a time-out, 69 that the lab cannot
    run here (see `upcall lab doctor`).

    \b
    Examples:
      $ upcall lab run -- cat /proc/version
      $ upcall lab run --kernel uml -- sh -c 'keyctl show'
    """
    _check_cpus(kernel, cpus)
    with _ending_by_signal(), _errors_shown(), _kernel_log_to(kernel_log, results) as folder:
        result = machine.run(
            argv,
            timeout=timeout,
            memory=memory,
            cpus=cpus,
            results=folder,
            out=_writer(sys.stdout.buffer),
            err=_writer(sys.stderr.buffer),
            kernel=kernel,
        )
    _exit_as(result)


@command.command(short_help="Open a shell in the guest, on this terminal.")
@kernel_option
@memory_option
@cpus_option
@results_option
@log_option
def shell(kernel: str, memory: int, cpus: int | None, results: Path | None, kernel_log: Path | None) -> None:
    """Open a shell in the guest, on this terminal, without a time limit.

    `exit` ends it; Ctrl-] ends it at once."""
    _check_cpus(kernel, cpus)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _fail("the shell needs a terminal; use `upcall lab run` for commands", os.EX_USAGE)
    program = "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"
    with _ending_by_signal(), _errors_shown(), _kernel_log_to(kernel_log, results) as folder:
        result = machine.run(
            [program, "-i"],
            timeout=None,
            memory=memory,
            cpus=cpus,
            results=folder,
            env={"TERM": os.environ.get("TERM", "linux")},
            out=_writer(sys.stdout.buffer),
            terminal=PseudoTerminal(sys.stdin.fileno()),
            kernel=kernel,
        )
    _exit_as(result)


@command.command()
@click.option(
    "--files", type=click.IntRange(5, 5000), default=40, show_default=True, metavar="N", help="For each person."
)
@click.option(
    "--bits",
    type=click.Choice(["2048", "3072", "4096"]),
    default="2048",
    show_default=True,
    help="Of each user's key.",
)
@timeout_option(300.0)
@kernel_option
@memory_option
@cpus_option
@results_option
@log_option
def ecryptfs(
    files: int,
    bits: str,
    timeout: float,
    kernel: str,
    memory: int,
    cpus: int | None,
    results: Path | None,
    kernel_log: Path | None,
) -> None:
    """Show three users' files on the real kernel's eCryptfs.

    root, alice and bob have a key, a daemon and a mount each; they create files, remount and read them at the
    same time; then alice's daemon is killed and started again. Exits with 0 only if every file came back equal, every
    refusal came at once and the kernel's log is clean. What broker and daemons log is in `log` in the results."""
    if kernel != "qemu":
        raise click.BadParameter("User-mode Linux has no eCryptfs messages; use qemu", param_hint="--kernel")
    arguments = [str(files), bits]
    _demonstrate("upcall.testing.lab.ecryptfs", arguments, timeout, kernel, memory, cpus, results, kernel_log)


@command.command(short_help="Show two users' files on a Kerberos file share.")
@click.option(
    "--files", type=click.IntRange(1, 5000), default=40, show_default=True, metavar="N", help="For each person."
)
@timeout_option(300.0)
@kernel_option
@memory_option
@cpus_option
@results_option
@log_option
def cifs(
    files: int,
    timeout: float,
    kernel: str,
    memory: int,
    cpus: int | None,
    results: Path | None,
    kernel_log: Path | None,
) -> None:
    """Show two users' files on a Kerberos file share, as the kernel's CIFS client mounts it.

    In the guest there are a KDC, an encrypting file server, and one mount on which alice and bob act in their own
    names. They write and read files; connections break and reconnect; a ticket is missing, a daemon is stopped.
    Needs krb5-kdc, krb5-admin-server, krb5-user, samba, cifs-utils and keyutils on this machine. Exits with 0 only
    if all checks passed and the kernel's log is clean. What broker and daemons log is in `log` in the results."""
    _check_cpus(kernel, cpus)
    _demonstrate("upcall.testing.lab.cifs", [str(files)], timeout, kernel, memory, cpus, results, kernel_log)


def _demonstrate(
    module: str,
    arguments: list[str],
    timeout: float,
    kernel: str,
    memory: int,
    cpus: int | None,
    results: Path | None,
    kernel_log: Path | None,
) -> NoReturn:
    env = {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)}
    if sys.stdout.isatty():
        env |= {"FORCE_COLOR": "1", "TERM": os.environ.get("TERM", "linux")}
    with _ending_by_signal(), _errors_shown(), _kernel_log_to(kernel_log, results) as folder:
        result = machine.run(
            startpython.command(module, *arguments),
            timeout=timeout,
            memory=memory,
            cpus=cpus,
            results=folder,
            env=env,
            out=_writer(sys.stdout.buffer),
            err=_writer(sys.stderr.buffer),
            kernel=kernel,
        )
    _exit_as(result)


@command.command()
@click.option("--kernel", type=click.Choice([*image.KERNELS]), help="Only this one.")
def fetch(kernel: str | None) -> None:
    """Download the newest kernels into the cache.

    About 70 MB for QEMU and 40 MB for User-mode Linux; `run` does it by itself the first time. Older kernels that
    are not in use are removed."""
    for name in [kernel] if kernel else image.KERNELS:
        with _ending_by_signal(), _errors_shown():
            fetched = image.fetch(machine.say_on_stderr, image.KERNELS[name])
        click.echo(f"{fetched.release} in {fetched.folder}")


@command.command(short_help="Say what the lab's kernels need, and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.option("--kernel", type=click.Choice([*image.KERNELS]), help="Only what this one needs.")
def doctor(as_json: bool, kernel: str | None) -> None:
    """Say what each of the lab's kernels needs, what is missing, and the remedy. Exits with 0 only if nothing is."""
    found = [(name, check) for name in ([kernel] if kernel else image.KERNELS) for check in checks(name)]
    if as_json:
        click.echo(json.dumps([{"kernel": name, **vars(check)} for name, check in found], indent=2))
    else:
        for name, check in found:
            remedy = f"; remedy: {check.remedy}" if check.remedy and not check.met else ""
            click.echo(f"{'ok     ' if check.met else 'MISSING'} {name}: {check.name}: {check.found}{remedy}")
    if not all(check.met for _, check in found):
        sys.exit(os.EX_UNAVAILABLE)


def _check_cpus(kernel: str, cpus: int | None) -> None:
    if kernel == "uml" and cpus not in (None, 1):
        raise click.BadParameter("User-mode Linux has one processor", param_hint="--cpus")


def _exit_as(result: machine.Result) -> NoReturn:
    for line in result.kernel_faults:
        click.echo(f"lab: the guest's kernel reported a fault: {line}", err=True)
    sys.exit(result.returncode or (EXIT_KERNEL_FAULT if result.kernel_faults else 0))


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"lab: {message}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except LabError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the machine was stopped", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has closed the pipe; Python would report it again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def _ending_by_signal() -> Iterator[None]:
    """A context in which signals end the process through the clean-up, which stops the machine."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _kernel_log_to(file: Path | None, results: Path | None) -> Iterator[Path | None]:
    """A context with the folder for the results. At its end, copies the kernel's log from it to `file`, unless that is
    None."""
    if file is None:
        yield results
        return
    with tempfile.TemporaryDirectory(prefix="upcall-lab-") as temporary:
        folder = results or Path(temporary)
        try:
            yield folder
        finally:
            if (folder / "kmsg").exists():
                shutil.copyfile(folder / "kmsg", file)


def _writer(stream: BinaryIO) -> Sink:
    def write(chunk: bytes) -> None:
        stream.write(chunk)
        stream.flush()

    return write
