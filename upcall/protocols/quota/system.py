"""What the clerk asks the system for: filesystems, figures, names. Any of it may block."""

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
    """`Kernel` below, or one that a test plays. OSError where something cannot be had."""

    def filesystems(self) -> dict[Mount, tuple[int, ...]]:
        """Those with quotas, and which kinds of them are counted there."""

    def changed(self) -> bool:
        """Whether something has been mounted or unmounted since this was asked last."""

    def get(self, mount: Mount, kind: int, number: int, /) -> Quota: ...

    def some(self, mount: Mount, kind: int, first: int, most: int, /) -> tuple[list[Quota], int]:
        """At most so many quotas from the id `first` on, and the id to go on with; -1 after the last."""

    def grace(self, mount: Mount, kind: int, resource: str, /) -> int:
        """For how many seconds somebody may be over a soft limit there; 0 if that is not said."""

    def name(self, kind: int, number: int, /) -> str: ...


class Kernel:
    """The kernel's own."""

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
    """None if there is no such file. OSError if others could have written it."""
    try:
        return bytes(read_private(path, MOST_STATE)[0])
    except FileNotFoundError:
        return None


def write_state(path: Path, data: bytes) -> None:
    """Whole or not at all, 0600; makes its folder. OSError."""
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
