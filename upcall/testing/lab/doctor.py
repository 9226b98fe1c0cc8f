"""Checks what the lab needs on this machine, and names remedies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import image, machine, packages, qemu, uml
from .errors import LabUnavailable
from .image import GuestKernel

MEMORY_OF_QEMU = 256  # MB beside the guest's own
ROOM = image.NEEDED_BYTES
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
PROCESSORS = Path("/proc/cpuinfo")
NO_TRACING = "3"  # Documentation/admin-guide/LSM/Yama.rst


@dataclass(frozen=True)
class LabCheck:
    """One requirement: its name, whether it is met, what was found, and the remedy."""

    name: str
    met: bool
    found: str
    remedy: str = ""


def checks(kernel: str = "qemu") -> Iterator[LabCheck]:
    """Yields the checks of all requirements of this kernel, in the order in which to fix them. Changes and downloads
    nothing."""
    wanted = image.named(kernel)
    yield _processor()
    if wanted is image.QEMU:
        yield _qemu()
    else:
        yield _tracing()
        yield _processor_state()
    yield _tools(wanted)
    yield _kernel(wanted)
    yield _cache(wanted)
    yield _memory() if wanted is image.QEMU else _memory_file()


def why_not(kernel: str = "qemu") -> str | None:
    """Returns why the lab cannot run this kernel here, with the remedy; None if it can."""
    for check in checks(kernel):
        if not check.met:
            return f"{check.name}: {check.found}" + (f" ({check.remedy})" if check.remedy else "")
    return None


def _processor() -> LabCheck:
    found = f"{platform.system()} on {platform.machine()}"
    # The guest runs the host's programs, so it needs the host's architecture.
    return LabCheck("processor", found == "Linux on x86_64", found, "use a Linux machine with an x86_64 processor")


def _processor_state() -> LabCheck:
    """Checks for AMX: User-mode Linux before 6.10 stores the processor's state in a buffer of fixed size, and panics
    at boot, in put_fp_registers, if that state does not fit."""
    try:
        flags = PROCESSORS.read_text("ascii", "replace").split()
    except OSError:
        flags = []
    found = "has AMX, which User-mode Linux cannot keep" if "amx_tile" in flags else "fits in"
    return LabCheck("processor state", "amx_tile" not in flags, found, "use --kernel qemu")


def _qemu() -> LabCheck:
    place = shutil.which(qemu.PROGRAM)
    if place is None:
        return LabCheck(qemu.PROGRAM, False, "not found", qemu.REMEDY)
    try:
        devices = subprocess.run(
            [place, "-machine", "none", "-device", "help"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return LabCheck(qemu.PROGRAM, False, f"{place} does not run: {error}", qemu.REMEDY)
    if "virtio-9p-pci" not in devices:
        return LabCheck(qemu.PROGRAM, False, f"{place} cannot share folders (virtio-9p-pci)", qemu.REMEDY)
    return LabCheck(qemu.PROGRAM, True, place)


def _tracing() -> LabCheck:
    scope = PTRACE_SCOPE.read_text().strip() if PTRACE_SCOPE.exists() else "0"
    remedy = "boot with kernel.yama.ptrace_scope below 3: User-mode Linux traces its own processes"
    return LabCheck("ptrace", scope != NO_TRACING, "forbidden to all" if scope == NO_TRACING else "allowed", remedy)


def _tools(kernel: GuestKernel) -> LabCheck:
    missing = packages.missing_tools()
    if not missing:
        return LabCheck("apt and dpkg", True, ", ".join(packages.TOOLS))
    if image.cached(kernel):
        return LabCheck("apt and dpkg", True, "not needed: the kernel is downloaded")
    return LabCheck("apt and dpkg", False, f"{', '.join(missing)} not found", "use a Debian system")


def _kernel(kernel: GuestKernel) -> LabCheck:
    if cached := image.cached(kernel):
        return LabCheck("kernel and busybox", True, f"{cached.release} in {cached.folder}")
    if packages.missing_tools():
        return LabCheck("kernel and busybox", False, "not downloaded, and there is no apt", "use a Debian system")
    package = kernel.package()
    if package and packages.candidate(package) and packages.candidate(image.BUSYBOX_PACKAGE):
        return LabCheck("kernel and busybox", True, f"{package} will be downloaded at the first run")
    if os.geteuid() == 0:
        return LabCheck("kernel and busybox", True, "apt's lists are empty; the first run will run `apt-get update`")
    return LabCheck("kernel and busybox", False, "not downloaded, and unknown to apt", "as root: apt-get update")


def _cache(kernel: GuestKernel) -> LabCheck:
    cache = image.cache_folder()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    remedy = "set XDG_CACHE_HOME to a folder that you may write to, with 1 GB free"
    if not os.access(existing, os.W_OK | os.X_OK):
        return LabCheck("cache", False, f"{existing} is not writable", remedy)
    free = shutil.disk_usage(existing).free
    if image.cached(kernel) is None and free < ROOM:
        return LabCheck("cache", False, f"{existing} has only {free >> 20} MB free", remedy)
    return LabCheck("cache", True, str(cache))


def _memory() -> LabCheck:
    needed = machine.MEMORY + MEMORY_OF_QEMU
    try:
        available = _available_memory()
    except (OSError, ValueError):
        return LabCheck("memory", True, "unknown")
    return LabCheck("memory", available >= needed, f"{available} MB available", f"free {needed} MB, or use --memory")


def _memory_file() -> LabCheck:
    try:
        folder = uml.memory_folder(machine.MEMORY)
    except LabUnavailable as error:
        return LabCheck("memory", False, "no room", str(error))
    return LabCheck("memory", True, f"room in {folder}")


def _available_memory() -> int:
    """Returns the kernel's estimate of available memory, in MB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) >> 10
