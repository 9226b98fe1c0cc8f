"""Determines the folders and sockets where broker, daemon and requesters find each other.

The system's broker uses /run/upcall; a user's own broker uses that user's runtime folder. The broker's sockets lie in
its folder. Only the folder's owner can create a socket there, so the path identifies the broker.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from upcall.core.errors import UsageError

SYSTEM_FOLDER = Path("/run/upcall")


def user_folder(create: bool = True) -> Path:
    """Returns this user's runtime folder, owned by the user and closed to others; created if necessary, unless it is
    only looked for. UsageError if another user owns it or can write to it; OSError."""
    uid = os.geteuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if base == "/run/user/0":
            continue  # removed at root's last logout, while root's daemon serves the machine
        # After su(1) the environment may name another user's folder.
        if base and Path(base).is_dir() and Path(base).stat().st_uid == uid:
            return own_folder(Path(base) / "upcall", 0o700, create)
    if uid == 0:
        return own_folder(SYSTEM_FOLDER / "root", 0o700, create)
    return own_folder(Path(f"/tmp/upcall-{uid}"), 0o700, create)  # noqa: S108 - ownership and mode are checked


def own_folder(folder: Path, mode: int, create: bool = True) -> Path:
    """Returns the folder, created with `mode` if necessary; without `create`, it need not be there. UsageError unless
    it belongs to this process's user and others cannot write to it. OSError."""
    if create:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    elif not os.path.lexists(folder):
        return folder
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder}: not a folder of our own that only we can write to")
    return folder


class Place(NamedTuple):
    """A broker's folder and the sockets in it."""

    folder: Path

    @property
    def socket(self) -> Path:
        """For requesters; open to all users."""
        return self.folder / "broker.sock"

    @property
    def request_key_socket(self) -> Path:
        """For forwarders of request_key; root only."""
        return self.folder / "request-key.sock"

    @property
    def registration_socket(self) -> Path:
        """For daemons; open to all users."""
        return self.folder / "registration.sock"

    @property
    def source_socket(self) -> Path:
        """For sources in processes of their own; the broker's own user only."""
        return self.folder / "source.sock"

    def owners(self) -> frozenset[int]:
        """Returns the uids that a broker here may have: root; the caller's, too, unless the folder is the system's."""
        return frozenset({0}) if self.folder == SYSTEM_FOLDER else frozenset({0, os.geteuid()})


def own_place(folder: Path | None = None) -> Place:
    """Returns the folder for a broker in this process, created if necessary. UsageError, OSError."""
    if folder is not None:
        return Place(own_folder(folder, 0o755))
    return Place(own_folder(SYSTEM_FOLDER, 0o755) if os.geteuid() == 0 else user_folder())


def find_place(folder: Path | None = None) -> Place:
    """Returns where to look for a broker: `folder`, or this user's own broker if it exists, otherwise the system's.
    UsageError, OSError."""
    if folder is not None:
        return Place(folder)
    own = Place(user_folder(create=False))
    return own if own.socket.exists() else Place(SYSTEM_FOLDER)


def daemon_socket(create: bool = True) -> Path:
    """Returns the socket of this user's daemon for the user's commands. `create`: see `user_folder`. UsageError,
    OSError."""
    return user_folder(create) / "daemon.sock"


def own_daemon_socket(path: Path) -> Path:
    """Returns the name that this process's socket has beside `path`, of which several daemons' sockets take turns."""
    return path.with_name(f"{path.name}.{os.getpid()}")


def own_daemon_sockets(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the names of `own_daemon_socket` beside `path`, of whatever process, and whether its pid is in use."""
    for found in path.parent.glob(f"{path.name}.*"):
        pid = found.name.removeprefix(f"{path.name}.")
        if pid.isdecimal():
            yield found, Path("/proc", pid).exists()
