"""Where broker, daemon and requesters find each other.

The system's broker lives in /run/upcall; a user's own in that user's runtime folder. In the broker's folder are its
sockets, for requesters and for daemons: only the broker's own user can put one there, so the path says whose it is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from upcall.core.errors import UsageError

SYSTEM_FOLDER = Path("/run/upcall")


def user_folder() -> Path:
    """This user's own runtime folder, made if need be, owned by the user and closed to others."""
    uid = os.geteuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if base == "/run/user/0":
            continue  # comes and goes with root's logins, and root's daemon is the machine's
        # After su(1) the environment may name another user's folder.
        if base and Path(base).is_dir() and Path(base).stat().st_uid == uid:
            return own_folder(Path(base) / "upcall", 0o700)
    if uid == 0:
        return own_folder(SYSTEM_FOLDER / "root", 0o700)
    return own_folder(Path(f"/tmp/upcall-{uid}"), 0o700)  # noqa: S108 - ownership and mode are checked


def own_folder(folder: Path, mode: int) -> Path:
    """The folder, ours and not writable by others; UsageError if somebody else made it."""
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder}: not a folder of our own that only we can write to")
    return folder


class Place(NamedTuple):
    """A broker's folder."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "broker.sock"

    @property
    def request_key_socket(self) -> Path:
        """For forwarders of request_key; root's."""
        return self.folder / "request-key.sock"

    @property
    def registration_socket(self) -> Path:
        """For daemons."""
        return self.folder / "registration.sock"

    @property
    def source_socket(self) -> Path:
        """For sources in processes of their own; the broker's own user's."""
        return self.folder / "source.sock"

    def owners(self) -> frozenset[int]:
        """The uids that a broker here may have: root's, or ours if the folder is not the system's."""
        return frozenset({0}) if self.folder == SYSTEM_FOLDER else frozenset({0, os.geteuid()})


def own_place(folder: Path | None = None) -> Place:
    """Where this process, being a broker, is to be found."""
    if folder is not None:
        return Place(own_folder(folder, 0o755))
    return Place(own_folder(SYSTEM_FOLDER, 0o755) if os.geteuid() == 0 else user_folder())


def find_place(folder: Path | None = None) -> Place:
    """Where to look for a broker: as told, or this user's own if there is one, or the system's."""
    if folder is not None:
        return Place(folder)
    own = Place(user_folder())
    return own if own.socket.exists() else Place(SYSTEM_FOLDER)


def daemon_socket() -> Path:
    """Where this user's daemon listens for this user's commands."""
    return user_folder() / "daemon.sock"
