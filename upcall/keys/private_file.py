"""Reads and creates files that no other user may access: key files, passphrase files, the key store.

Errors are OSError with a `strerror` for people and the path as `filename`.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from pathlib import Path
from typing import NamedTuple

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # NONBLOCK: opening a FIFO must not hang
_WRITE_UNNAMED = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # open(2), "BUGS": older kernels and file systems
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Fingerprint(NamedTuple):
    """Identifies a file's content by fields of stat(2): equal fingerprints mean the same file, unchanged."""

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


def read_private(path: str | Path, limit: int, directory: int | None = None) -> tuple[bytearray, Fingerprint]:
    """Reads a file that no other user can read or write. Returns its content, which the caller wipes, and its
    fingerprint from before reading.

    OSError if it is not a regular file, belongs to a user other than this process's or root, is accessible to others,
    or is longer than `limit` bytes. All is checked on the open descriptor, so the file cannot be swapped in between.
    Symbolic links are followed: the checks apply to their target. With `directory`, a descriptor, the file of that
    name in it is opened, wherever `path` leads by now, and a link is refused with ELOOP.
    """
    name = os.fspath(path)
    if directory is None:
        fd = os.open(name, _READ)
    else:
        fd = os.open(Path(name).name, _READ | os.O_NOFOLLOW, dir_fd=directory)
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
        raise PermissionError(errno.EPERM, f"mode {mode:04o} lets others in: `chmod 600 {shlex.quote(name)}`", name)


def _read_into(fd: int, buffer: bytearray) -> int:
    """Reads until the buffer is full or the file ends. Returns the number of bytes."""
    size = 0
    with memoryview(buffer) as view:
        while size < len(buffer) and (count := os.readv(fd, [view[size:]])):
            size += count
    return size


def write_new(path: Path, data: bytes | bytearray) -> None:
    """Creates a file with mode 0600, atomically and durably. FileExistsError if the path exists; OSError.

    Writes a file without a name, which is gone if this process is killed, and links it to its name: link(2), unlike
    rename(2), never replaces. File systems without such files (O_TMPFILE) get a temporary name in the same folder.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fd = os.open(".", _WRITE_UNNAMED, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
            _write_beside(path.name, data, directory)
        else:
            try:
                _fill(fd, data)
                os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(fd)
        os.fsync(directory)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "is there already", str(path)) from error
    finally:
        os.close(directory)


def _write_beside(name: str, data: bytes | bytearray, directory: int) -> None:
    beside = f".{name}.{os.urandom(6).hex()}"
    fd = os.open(beside, _WRITE_NEW, 0o600, dir_fd=directory)
    try:
        _fill(fd, data)
        os.link(beside, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(fd)
        os.unlink(beside, dir_fd=directory)


def replace_private(path: Path, data: bytes | bytearray) -> None:
    """Creates or replaces a file with mode 0600, atomically and durably. OSError."""
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    write_new(beside, data)
    try:
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or removed in a folder durable. OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_over(path: Path, data: bytes | bytearray) -> None:
    """Creates or replaces a file that a person has named, as `replace_private`. Symbolic links are followed. OSError;
    it names `path`."""
    target = Path(os.path.realpath(path))
    try:
        if os.path.lexists(target) and not target.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")
        replace_private(target, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _fill(fd: int, data: bytes | bytearray) -> None:
    os.fchmod(fd, 0o600)  # the umask may have removed the owner's permissions
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(fd, view[at:])
    os.fsync(fd)


def wipe(buffer: bytearray) -> None:
    """Overwrites a buffer with zeros. Copies made by libraries or the interpreter remain."""
    buffer[:] = bytes(len(buffer))
