"""Starts QEMU, so that it ends with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from upcall.kernel import libc

from .errors import LabUnavailable
from .start import PORTS, Machine

PROGRAM = "qemu-system-x86_64"
REMEDY = "apt-get install --no-install-recommends qemu-system-x86"
PR_SET_PDEATHSIG = 1

# `quiet` limits the output on the slow emulated serial line to errors; the whole log is read from /dev/kmsg.
# Mitigations of the processor's side channels are off: the guest belongs to the user, and they are slow to emulate.
#
# The kernel would not trust the emulated TSC, and would read an emulated HPET, which costs microseconds.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 printk.devkmsg=on log_buf_len=4M mitigations=off tsc=reliable clocksource=tsc"
)


def command_line(machine: Machine, ports: Mapping[str, int]) -> list[str]:
    """Returns QEMU's command. `ports`: descriptors of connected sockets for all of PORTS."""
    line = [
        PROGRAM,
        *("-no-user-config", "-nodefaults", "-no-reboot"),
        *("-display", "none", "-machine", "pc", "-rtc", "base=utc"),
        # Without KVM: in a virtual machine it may exist, but hang in the firmware.
        *("-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", str(machine.cpus), "-m", str(machine.memory)),
        *("-kernel", str(machine.image.kernel), "-initrd", str(machine.initramfs), "-append", KERNEL_OPTIONS),
        *("-chardev", f"file,id=console,path={_escaped(machine.console)}", "-serial", "chardev:console"),
        *("-virtfs", _shared("host", Path("/"), "readonly=on")),
        *("-virtfs", _shared("results", machine.results, "readonly=off")),
        *("-device", "virtio-serial-pci"),
    ]
    for number, name in enumerate(PORTS, start=1):
        kind = "virtconsole" if machine.terminal and name == "out" else "virtserialport"
        line += ["-chardev", f"socket,id={name},fd={ports[name]}"]
        line += ["-device", f"{kind},chardev={name},nr={number},name={name}"]
    return line


@contextlib.contextmanager
def running(machine: Machine, ports: Mapping[str, socket.socket]) -> Iterator[subprocess.Popen[bytes]]:
    """A context with a running QEMU. `ports`: its ends of the sockets. At the context's end QEMU was killed and
    reaped, also after an exception."""
    with machine.complaints.open("wb") as complaints:
        process = _start(machine, ports, complaints.fileno())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _start(machine: Machine, ports: Mapping[str, socket.socket], errors: int) -> subprocess.Popen[bytes]:
    if shutil.which(PROGRAM) is None:
        raise LabUnavailable(f"{PROGRAM} not found: {REMEDY}")
    descriptors = {name: port.fileno() for name, port in ports.items()}
    return subprocess.Popen(
        command_line(machine, descriptors),
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=tuple(descriptors.values()),
        start_new_session=True,  # Ctrl-C must reach only this process, which ends the machine in order
        preexec_fn=_die_with(os.getpid()),
    )


def _die_with(parent: int) -> Callable[[], None]:
    """Returns a function for the child to call before exec: sets PR_SET_PDEATHSIG, so that QEMU ends with this
    process."""
    prctl = libc.function("prctl")

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(os.EX_TEMPFAIL)

    return in_child


def _shared(tag: str, folder: Path, access: str) -> str:
    return f"local,path={_escaped(folder)},mount_tag={tag},security_model=none,{access},multidevs=remap"


def _escaped(path: Path) -> str:
    """Escapes a path in QEMU's options, where commas end a value and are doubled."""
    return str(path).replace(",", ",,")
