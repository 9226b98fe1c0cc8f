"""/dev/ecryptfs: the kernel's public-key requests for one uid.

Source: fs/ecryptfs/miscdev.c of Linux 6.1. The kernel registers a daemon for the *euid* that opens the device, and
routes a request by the euid of the process that opens the file. The device stays 0600 root.
"""

from __future__ import annotations

import os
import platform
import select
import threading
from pathlib import Path

from upcall.core.errors import UsageError
from upcall.kernel import libc
from upcall.protocols.ecryptfs.packets import MAX_READ

DEVICE = Path("/dev/ecryptfs")

# Raw numbers, because glibc's wrappers change every thread of the process.
_SETRESUID, _SETFSUID = {
    "x86_64": (117, 122),
    "aarch64": (147, 151),
    "riscv64": (147, 151),
}.get(platform.machine(), (0, 0))


class Miscdev:
    """The device, open in one uid's name. One reader only; level-triggered readiness works, nothing else does."""

    def __init__(self, uid: int, path: Path = DEVICE) -> None:
        """OSError: ENOENT without the ecryptfs module, EINVAL while another daemon of this uid holds it."""
        self.uid = uid
        self.fd = _open_as(uid, path)

    def fileno(self) -> int:
        return self.fd

    def readable(self) -> bool:
        """Whether `read` returns at once. The device ignores O_NONBLOCK, so this must be asked before."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def read(self) -> bytes:
        """One frame. Empty after a signal: neither an end nor an error."""
        return os.read(self.fd, MAX_READ)

    def write(self, frame: bytes) -> None:
        """One answer. OSError EINVAL: its waiter has gone (late or duplicate); log it and live on."""
        os.write(self.fd, frame)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_as(uid: int, path: Path) -> int:
    """Opens with euid `uid`, so that the kernel registers that uid, and fsuid 0, so that 0600 root suffices.

    In a thread of its own: credentials belong to threads, and no other thread may ever be seen with these.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    if uid == os.geteuid():
        return os.open(path, flags)
    if not _SETRESUID:
        raise UsageError(f"opening {path} for another uid is not known on {platform.machine()}")
    result: list[int | OSError] = []

    def work() -> None:
        try:
            libc.syscall(_SETRESUID, -1, uid, -1)
            libc.syscall(_SETFSUID, 0)
            result.append(os.open(path, flags))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=work, name=f"open-{uid}")
    thread.start()  # the credentials end with the thread
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
