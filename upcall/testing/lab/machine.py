"""Runs one command in the guest: prepares, starts and stops the machine."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcall.testing.lab import guest, image, kernellog, qemu, uml
from upcall.testing.lab.carrier import Carrier, Sink
from upcall.testing.lab.errors import LabError, MachineDied
from upcall.testing.lab.results import staging
from upcall.testing.lab.start import PORTS, Machine
from upcall.testing.lab.terminal import PseudoTerminal

TIME_LIMIT = 300.0  # seconds
MEMORY = 1536  # MB
CPUS = 2  # with QEMU; User-mode Linux has one
POWER_OFF_PATIENCE = 5.0  # seconds
CONSOLE_TAIL = 40  # lines

RUNNING = {"qemu": qemu.running, "uml": uml.running}


@dataclass(frozen=True)
class Result:
    """The result of a command. `stdout` and `stderr`: empty if a sink received them. `kernel_faults`: lines of the
    kernel's log that report a fault of the kernel. `kernel_log`: the whole log. `boot_seconds`: until the command
    started; `seconds`: in all."""

    returncode: int
    stdout: bytes
    stderr: bytes
    kernel_log: str
    kernel_faults: tuple[str, ...]
    boot_seconds: float
    seconds: float


def say_on_stderr(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)  # noqa: T201


def run(
    argv: Sequence[str],
    *,
    timeout: float | None = TIME_LIMIT,
    memory: int = MEMORY,
    cpus: int | None = None,
    results: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    out: Sink | None = None,
    err: Sink | None = None,
    terminal: PseudoTerminal | None = None,
    kernel: str = "qemu",
    init: Path | None = None,
) -> Result:
    """Boots a machine and runs `argv` there as root. Blocks until the command ends.

    `cwd`: its working directory; default: this process's. `kernel`: "qemu" or "uml", see `upcall.testing.lab`.
    `timeout`: seconds, including the boot. `memory`: MB. `cpus`: for "qemu" only; default: 2. `init`: path of a
    systemd to run as process 1, with the command as its only service. Output goes to the sinks as it arrives,
    otherwise to the Result. `results`: a folder that receives the files of /results, and the kernel's log as `kmsg`,
    also if this raises LabUnavailable, LabTimedOut or MachineDied."""
    if not argv:
        raise ValueError("no command to run")
    wanted = image.named(kernel)
    if wanted is image.UML and cpus not in (None, 1):
        raise ValueError("the kernel uml has one processor")
    kept = image.ensure(say_on_stderr, wanted)
    with (
        kept.in_use(),
        staging(results) as written,
        tempfile.TemporaryDirectory(prefix="upcall-lab-") as work,
    ):
        session = guest.Session(
            argv=argv,
            cwd=(cwd or Path.cwd()).resolve(),
            mark=f"lab-end-{secrets.token_hex(8)}",
            release=kept.release,
            modules=kept.modules.resolve(),
            env=env or {},
            terminal=terminal.size() if terminal else None,
            kernel=kernel,
            init=init,
        )
        initramfs = Path(work) / "initramfs"
        initramfs.write_bytes(image.initramfs(kept, guest.files(session)))
        console = Path(work) / "console"
        machine = Machine(kept, initramfs, console, written, memory, cpus or CPUS, terminal is not None)
        return _through(machine, session.mark.encode(), timeout, {"out": out, "err": err}, terminal)


def _through(
    machine: Machine,
    mark: bytes,
    timeout: float | None,
    given: Mapping[str, Sink | None],
    terminal: PseudoTerminal | None,
) -> Result:
    """Runs a machine from its start to its end. Returns the Result."""
    started = time.monotonic()
    kept = {"out": bytearray(), "err": bytearray(), "log": bytearray()}
    sinks: dict[str, Sink] = {name: given.get(name) or gathered.extend for name, gathered in kept.items()}
    if terminal:
        del sinks["err"]  # a terminal has only one stream
    carrier = Carrier(mark, sinks, started + timeout if timeout else None, terminal)
    try:
        with _ports() as (ours, theirs), _running(machine, theirs) as process:
            carrier.carry(process, ours)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POWER_OFF_PATIENCE)
    except LabError as error:
        if faults := _faults(machine, bytes(kept["log"])):
            error.args = ("; ".join([str(error), *faults]),)
        raise
    finally:
        (machine.results / "kmsg").write_text(kernellog.readable(bytes(kept["log"])))
    if carrier.returncode is None:
        raise MachineDied(last_words(machine, carrier.ready_at is not None))
    ended = time.monotonic()
    return Result(
        returncode=carrier.returncode,
        stdout=bytes(kept["out"]),
        stderr=bytes(kept["err"]),
        kernel_log=kernellog.readable(bytes(kept["log"])),
        kernel_faults=tuple(_faults(machine, bytes(kept["log"]))),
        boot_seconds=(carrier.ready_at or ended) - started,
        seconds=ended - started,
    )


@contextlib.contextmanager
def _ports() -> Iterator[tuple[dict[str, socket.socket], dict[str, socket.socket]]]:
    """A context with connected sockets by the ports' names: this process's ends, and the machine's."""
    with contextlib.ExitStack() as stack:
        pairs = {name: socket.socketpair() for name in PORTS}
        for pair in pairs.values():
            stack.enter_context(pair[0])
            stack.enter_context(pair[1])
        yield {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


@contextlib.contextmanager
def _running(machine: Machine, ports: Mapping[str, socket.socket]) -> Iterator[subprocess.Popen[bytes]]:
    """A context with a running machine. At its end the machine was killed and reaped, also after an exception."""
    with RUNNING[machine.image.of.name](machine, ports) as process:
        for port in ports.values():
            port.close()  # otherwise this process's ends would never report end of file
        yield process


def _faults(machine: Machine, log: bytes) -> list[str]:
    return kernellog.faults(log) or kernellog.console_faults(_text(machine.console))


def last_words(machine: Machine, booted: bool) -> str:
    """Returns why the machine ended, from its console and the output of the program that runs it."""
    what = "the machine ended before the command did" if booted else "the machine did not boot"
    lines = [line.strip() for line in _text(machine.complaints).splitlines()]
    console = _text(machine.console).splitlines()
    lines += kernellog.console_faults("\n".join(console[:-CONSOLE_TAIL]))  # a trace can be longer than the tail
    lines += [line.strip() for line in console[-CONSOLE_TAIL:]]
    return "\n".join([what, *(f"  {line}" for line in lines if line)])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
