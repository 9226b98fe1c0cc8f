"""Starts User-mode Linux, a kernel that is an ordinary program, so that all its processes end with this one.

The program is several processes: the kernel, its helper threads, and one for each address space of the guest, which
the kernel traces. Those that are traced would run on untraced, their system calls the host's, if only the kernel
itself were killed. So its whole process group is killed at once: by us, or by a shell that waits for our end."""

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
# Reads the process group from the pipe, and then the pipe's end: nobody is left who could have ended the group.
GUARDIAN = ("/bin/sh", "-c", "read -r group || exit; read -r nothing; kill -s KILL -- -$group")

# `quiet` keeps all but errors from the console; the whole log comes through /dev/kmsg.
KERNEL_OPTIONS = ("quiet", "panic=-1", "noreboot", "printk.devkmsg=on", "log_buf_len=4M")
CHANNELS = ("con=null", "con0=null,fd:1", "ssl=null")  # nothing but what is asked for below; the console is our stdout


def command_line(machine: Machine, ports: Mapping[str, int]) -> list[str]:
    """The whole argument list; `ports` has the descriptor of a connected socket for each of PORTS."""
    line = [str(machine.image.kernel), f"mem={machine.memory}M", f"initrd={machine.initramfs}"]
    line += [f"uml_dir={machine.console.parent}", "umid=lab", *KERNEL_OPTIONS, *CHANNELS]
    return line + [f"ssl{number}=fd:{ports[name]},fd:{ports[name]}" for number, name in enumerate(PORTS, start=1)]


@contextlib.contextmanager
def running(machine: Machine, ports: Mapping[str, socket.socket]) -> Iterator[subprocess.Popen[bytes]]:
    """The kernel, started with our ends' partners; however the block is left, its processes have ended."""
    folder = memory_folder(machine.memory)
    with _guardian() as guardian:
        process = _start(machine, ports, folder, guardian)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself and is reaped
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def memory_folder(needed: int) -> Path:
    """Where the file that is the guest's memory may lie, `needed` MB. Raises LabUnavailable if nowhere.

    The kernel removes the file's name at once. It runs programs from it, so a folder mounted noexec will not do; on a
    disk it works, but slower."""
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
    """The descriptor that takes a process group's id, as a line. When we end, however we end, the group is killed."""
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
    """For the child to run before it becomes the kernel, which ends by abort() after a panic, and which has a
    descriptor open for each of the host's files that the guest remembers."""
    os.write(guardian, b"%d\n" % os.getpid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
