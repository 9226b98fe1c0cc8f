"""Starts User-mode Linux, a kernel that is an ordinary program, so that all its processes end with this one.

It consists of several processes: the kernel, helper threads, and one for each address space of the guest, which the
kernel traces. If only the kernel were killed, the traced ones would continue, with system calls on the host. So the
whole process group is killed at once: by this process, or by a shell that waits for this process's end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import LabUnavailable
from .start import PORTS, Machine

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# Reads the process group from the pipe, and then the pipe's end: the process that should have ended the group is gone.
GUARDIAN = ("/bin/sh", "-c", "read -r group || exit; read -r nothing; kill -s KILL -- -$group")

# `quiet` limits the console's output to errors; the whole log is read from /dev/kmsg.
KERNEL_OPTIONS = ("quiet", "panic=-1", "noreboot", "printk.devkmsg=on", "log_buf_len=4M")
CHANNELS = ("con=null", "con0=null,fd:1", "ssl=null")  # nothing but what is asked for below; the console is our stdout


def command_line(machine: Machine, ports: Mapping[str, int]) -> list[str]:
    """Returns the kernel's command. `ports`: descriptors of connected sockets for all of PORTS."""
    line = [str(machine.image.kernel), f"mem={machine.memory}M", f"initrd={machine.initramfs}"]
    line += [f"uml_dir={machine.console.parent}", "umid=lab", *KERNEL_OPTIONS, *CHANNELS]
    return line + [f"ssl{number}=fd:{ports[name]},fd:{ports[name]}" for number, name in enumerate(PORTS, start=1)]


@contextlib.contextmanager
def running(machine: Machine, ports: Mapping[str, socket.socket]) -> Iterator[subprocess.Popen[bytes]]:
    """A context with a running kernel. `ports`: its ends of the sockets. At the context's end all its processes were
    killed, also after an exception."""
    folder = memory_folder(machine.memory)
    with _guardian() as guardian:
        process = _start(machine, ports, folder, guardian)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended already and was reaped
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def memory_folder(needed: int) -> Path:
    """Returns a folder for the file of the guest's memory, of `needed` MB. LabUnavailable if there is none.

    The kernel unlinks the file at once. It maps code from it, so the folder must not be mounted noexec. A folder on a
    disk is slower."""
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            room = found.f_bavail * found.f_frsize >> 20
            if room >= needed and not found.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise LabUnavailable(
        f"neither {SHARED_MEMORY} nor {tempfile.gettempdir()} has {needed} MB for the guest's memory and may run "
        "programs: set TMPDIR to a folder that does, or use --memory"
    )


@contextlib.contextmanager
def _guardian() -> Iterator[int]:
    """A context with a descriptor to which to write a process group's id, as a line. The group is killed when this
    process ends, for whatever reason."""
    shell = subprocess.Popen(GUARDIAN, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
    try:
        assert shell.stdin is not None  # noqa: S101 - it was asked for
        yield shell.stdin.fileno()
    finally:
        shell.kill()
        shell.communicate()


def _start(
    machine: Machine, ports: Mapping[str, socket.socket], memory: Path, guardian: int
) -> subprocess.Popen[bytes]:
    work = machine.console.parent
    (work / "results").symlink_to(machine.results)  # uml.sh mounts it
    descriptors = {name: port.fileno() for name, port in ports.items()}
    with machine.console.open("wb") as console, machine.complaints.open("wb") as complaints:
        try:
            return subprocess.Popen(
                command_line(machine, descriptors),
                cwd=work,
                env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": str(memory)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=complaints,
                pass_fds=tuple(descriptors.values()),
                start_new_session=True,  # a Ctrl-C is for us; and the kernel leaves any group but its own
                preexec_fn=lambda: _prepare(guardian),
            )
        except OSError as error:
            raise LabUnavailable(f"cannot run {machine.image.kernel}: {error.strerror}") from error


def _prepare(guardian: int) -> None:
    """Reports the process group to the guardian, and sets limits, in the child before exec: no core files, because the
    kernel aborts after a panic; many descriptors, because it needs one for each of the host's files in the guest's
    caches."""
    os.write(guardian, b"%d\n" % os.getpid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
