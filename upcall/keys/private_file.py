"""Files that are nobody else's business: key files, passphrase files, the key store.

Everything here raises OSError with a `strerror` for people and the path as `filename`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # NONBLOCK: opening a FIFO must not hang
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Fingerprint(NamedTuple):
    """What `stat` says about a file. Two that are equal: the same file with the same content."""

    device: int
    inode: int
    modified: int  # ns
    changed: int  # ns
    size: int
    mode: int
    uid: int


def fingerprint(found: os.stat_result) -> Fingerprint:
    return Fingerprint(
        found.st_dev,
        found.st_ino,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_size,
        found.st_mode,
        found.st_uid,
    )


def read_private(path: str | Path, limit: int) -> tuple[bytearray, Fingerprint]:
    """The content of a file that only we can read or write, and its fingerprint from before the reading.

    Refused with an OSError: not a regular file, not ours (or root's), open to others, longer than `limit`
    bytes. All is checked on the opened descriptor, so that nobody can swap the file in between; for the same
    reason a symbolic link is followed: whose file it leads to is what counts. The caller wipes the buffer.
    """
    name = os.fspath(path)
    fd = os.open(name, _READ)
    try:
        found = os.fstat(fd)
        _check_private(found, name)
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, at most {limit} are allowed", name)
        data = bytearray(found.st_size + 1)
        size = _read_into(fd, data)
    finally:
        os.close(fd)
    if size > found.st_size:
        raise OSError(errno.EBUSY, "grew while it was read", name)
    del data[size:]
    return data, fingerprint(found)


def _check_private(found: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory", name)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", name)
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"belongs to uid {found.st_uid}, not to us", name)
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(errno.EPERM, f"mode {mode:04o} lets others in, chmod 600 it", name)


def _read_into(fd: int, buffer: bytearray) -> int:
    """Reads until the buffer is full or the file ends, into a buffer that can be wiped."""
    size = 0
    with memoryview(buffer) as view:
        while size < len(buffer) and (count := os.readv(fd, [view[size:]])):
            size += count
    return size


def write_new(path: Path, data: bytes | bytearray) -> None:
    """A new file, 0600, either whole or not there. FileExistsError rather than touch one that exists.

    The content goes to a file beside it that is then linked to its name: unlike rename, link never replaces.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    beside = f".{path.name}.{os.urandom(6).hex()}"
    try:
        fd = os.open(beside, _WRITE_NEW, 0o600, dir_fd=directory)
        try:
            _fill(fd, data)
            os.link(beside, path.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(fd)
            os.unlink(beside, dir_fd=directory)
        os.fsync(directory)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "is there already", str(path)) from error
    finally:
        os.close(directory)


def _fill(fd: int, data: bytes | bytearray) -> None:
    os.fchmod(fd, 0o600)  # the umask may have taken the owner's own rights
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(fd, view[at:])
    os.fsync(fd)


def wipe(buffer: bytearray) -> None:
    """Overwrites in place. Copies that libraries or the interpreter made are out of reach."""
    buffer[:] = bytes(len(buffer))
