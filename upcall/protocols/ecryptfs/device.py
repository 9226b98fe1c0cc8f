"""Opens, reads and writes /dev/ecryptfs, which carries the kernel's public-key requests for one uid.

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

# System call numbers, because glibc's wrappers change the credentials of all threads of the process.
_SETRESUID, _SETFSUID = {
    "x86_64": (117, 122),
    "aarch64": (147, 151),
    "riscv64": (147, 151),
}.get(platform.machine(), (0, 0))


class Miscdev:
    """The device, opened with one euid. Only one thread may read. Use level-triggered polling: edge-triggered polling
    and O_NONBLOCK do not work."""

    def __init__(self, uid: int, path: Path = DEVICE) -> None:
        """OSError: ENOENT without the ecryptfs module, EINVAL while another daemon of this uid holds it."""
        self.uid = uid
        self.fd = _open_as(uid, path)

    def fileno(self) -> int:
        return self.fd

    def readable(self) -> bool:
        """Returns whether `read` would not block. The device ignores O_NONBLOCK, so call this before."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def read(self) -> bytes:
        """Reads one frame; blocks if none is pending. Empty after a signal: neither end of file nor error."""
        return os.read(self.fd, MAX_READ)

    def write(self, frame: bytes) -> None:
        """Writes one answer. OSError EINVAL: the requester has gone (late or duplicate answer); not fatal."""
        os.write(self.fd, frame)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_as(uid: int, path: Path) -> int:
    """Opens with euid `uid`, so that the kernel registers that uid, and fsuid 0, so that mode 0600 root suffices.

    Credentials belong to threads, so a thread of its own changes them: no other thread ever has them.
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
