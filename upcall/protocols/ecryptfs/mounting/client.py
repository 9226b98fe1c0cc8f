"""Asks the source for mounts: opens the folders without following links, and sends the descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from upcall.core.errors import UpcallError, UsageError
from upcall.kernel.local import connect
from upcall.kernel.mounts import mounts
from upcall.process.paths import SYSTEM_FOLDER
from upcall.protocols.ecryptfs.mounting.messages import (
    MAX_REPLY,
    MOUNT,
    UNMOUNT,
    MountRequest,
    pack_request,
    take_made,
    take_reply,
)

SOCKET: Final = "mount.sock"
_PATIENCE: Final = 15.0  # seconds; the source ends a request after ten


class NoMountSource(UpcallError):
    """No source that mounts is running."""


class MountRefused(UpcallError):
    """The source has refused. `status`: an exit status of sysexits.h; the text has reason and remedy."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


def open_folder(path: Path) -> int:
    """Returns an O_PATH descriptor of a folder, given its absolute path, of which no component may be a symbolic link.
    OSError with the component that is one, or is missing."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open("/", flags)
    at = Path("/")
    for part in path.parts[1:]:
        at /= part
        try:
            above, here = here, os.open(part, flags, dir_fd=here)
        except OSError as error:
            os.close(here)
            if at.is_symlink():
                why = f"is a symbolic link, which is not followed: name the folder itself ({at.resolve()})"
                raise OSError(errno.ELOOP, why, str(at)) from None
            raise OSError(error.errno, error.strerror, str(at)) from None
        os.close(above)
    return here


def ask_mount(request: MountRequest, lower: Path, upper: Path, folder: Path = SYSTEM_FOLDER) -> str:
    """Has the source mount `upper` over `lower`. Returns the path where it is mounted. NoMountSource, MountRefused;
    OSError if a folder cannot be opened."""
    return _ask(request._replace(kind=MOUNT), (lower, upper), folder)


def ask_unmount(name: str, upper: Path, lazy: bool = False, folder: Path = SYSTEM_FOLDER) -> str:
    """Has the source unmount. Otherwise as `ask_mount`."""
    return _ask(MountRequest(UNMOUNT, name, (), 0, "", lazy), (upper,), folder)


def _ask(request: MountRequest, paths: Sequence[Path], folder: Path) -> str:
    data = pack_request(request)
    socket_path = folder / SOCKET
    owners = frozenset({0}) if folder == SYSTEM_FOLDER else frozenset({0, os.geteuid()})
    try:
        connection = connect(socket_path, owners)
    except (OSError, UsageError) as error:
        raise NoMountSource(f"no service mounts for users here ({socket_path}: {_why(error)})") from None
    with connection:
        connection.settimeout(_PATIENCE)
        with _opened(paths) as folders, contextlib.suppress(BrokenPipeError):  # refused already: the answer is there
            socket.send_fds(connection, [data], folders)
        # The descriptors are closed now, and the source waits for this: they would keep a mount busy.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        try:
            reply = take_reply(_received(connection))
        except TimeoutError:
            raise MountRefused(os.EX_TEMPFAIL, f"no answer within {_PATIENCE:g} s") from None
        except ConnectionError as error:
            raise NoMountSource(f"the source that mounts has ended: {error.strerror}") from None
    if reply.status:
        raise MountRefused(reply.status, reply.text)
    return reply.text


def _received(connection: socket.socket) -> bytes:
    """Returns the reply, also of a source that has refused without reading the request: then the connection is reset,
    once, and the reply comes after that (unix(7))."""
    try:
        data = connection.recv(MAX_REPLY + 1)
    except ConnectionResetError:
        data = connection.recv(MAX_REPLY + 1)
    if not data:
        raise ConnectionAbortedError(errno.ECONNABORTED, "no answer")
    return data


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    folders: list[int] = []
    try:
        for path in paths:
            folders.append(open_folder(path))
        yield folders
    finally:
        for fd in folders:
            os.close(fd)


def mounted(uid: int) -> dict[str, str]:
    """Returns the mounts of a user in this process's mount namespace: name -> path. OSError."""
    found = {}
    for mount in mounts():
        made = take_made(mount.source) if mount.type == "ecryptfs" else None
        if made is not None and made.uid == uid:
            found[made.name] = mount.point
    return found
