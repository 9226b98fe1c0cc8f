"""Reads filesystems, figures and names from the system for the worker. Every call may block."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final, Protocol

from upcall.kernel import quotactl
from upcall.kernel.mounts import Changes, Mount, Names, mounts
from upcall.keys.private_file import read_private
from upcall.protocols.quota.notice import FILES
from upcall.protocols.quota.warning import Quota

MOST_STATE: Final = 64 << 20  # bytes of the state file


class World(Protocol):
    """The system as the worker sees it: `Kernel`, or a test double. All methods may block and raise OSError."""

    def filesystems(self) -> dict[Mount, tuple[int, ...]]:
        """Returns the filesystems with enforced quotas and the kinds of quota that are enforced."""

    def changed(self) -> bool:
        """Returns whether mounts have changed since the last call."""

    def get(self, mount: Mount, kind: int, number: int, /) -> Quota:
        """Returns one quota. `kind`: the kernel's quota type; `number`: the id."""

    def some(self, mount: Mount, kind: int, first: int, most: int, /) -> tuple[list[Quota], int]:
        """Returns at most `most` quotas from the id `first` on, and the id to continue with; -1 after the last."""

    def grace(self, mount: Mount, kind: int, resource: str, /) -> int:
        """Returns the grace period of a soft limit in seconds; 0 if it is not set."""

    def name(self, kind: int, number: int, /) -> str:
        """Returns the name of a user, group or project; the number as text if it has none."""


class Kernel:
    """Implements World with quotactl(2), mountinfo and the name service."""

    def __init__(self) -> None:
        self._names = Names()
        self._mountinfo = Changes()

    def filesystems(self) -> dict[Mount, tuple[int, ...]]:
        return quotactl.with_quotas(mounts())

    def changed(self) -> bool:
        return self._mountinfo.seen()

    def get(self, mount: Mount, kind: int, number: int) -> Quota:
        with quotactl.opened(mount) as filesystem:
            return filesystem.get(kind, number)

    def some(self, mount: Mount, kind: int, first: int, most: int) -> tuple[list[Quota], int]:
        found: list[Quota] = []
        with quotactl.opened(mount) as filesystem:
            for _ in range(most):
                quota = filesystem.next(kind, first)
                if quota is None:
                    return found, -1
                found.append(quota)
                first = quota.id + 1
                if first > 0xFFFFFFFF:
                    return found, -1
        return found, first

    def grace(self, mount: Mount, kind: int, resource: str) -> int:
        with quotactl.opened(mount) as filesystem:
            return filesystem.grace(kind)[resource == FILES]

    def name(self, kind: int, number: int) -> str:
        return self._names.subject(kind, number)


def read_state(path: Path) -> bytes | None:
    """Returns the state file's content; None if it does not exist. OSError if other users could have written it."""
    try:
        return bytes(read_private(path, MOST_STATE)[0])
    except FileNotFoundError:
        return None


def write_state(path: Path, data: bytes) -> None:
    """Writes the state file atomically, with mode 0600; creates its folder. OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.flush()
        os.fsync(fd)
    beside.replace(path)
