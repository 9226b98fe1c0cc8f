"""Finds, opens and reads lower files, without following symbolic links.

A lower file is the encrypted file below an eCryptfs mount. Its header is in its contents or in an extended attribute.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs.header import MAX_HEADER, XATTR, Header, has_marker, take_header

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW  # NONBLOCK: a FIFO must not hang
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_MAX_LINKS: Final = 40  # on the way to a path; the kernel's limit
_MAX_DEPTH: Final = 200  # folders below each other, each of which takes a descriptor

Inode = tuple[int, int]  # device and inode number


class NotEncrypted(PeerError):
    """The file has no eCryptfs header: neither in its contents nor in its attribute."""

    def __init__(self) -> None:
        super().__init__("eCryptfs header", "no marker: this is no eCryptfs file, or it is damaged", 8)


class LowerFile(NamedTuple):
    """An open lower file. The caller closes `fd`, which is for reading. `data`: the bytes of the header, to be parsed;
    `in_xattr`: where they are."""

    fd: int
    stat: os.stat_result
    data: bytes
    in_xattr: bool

    def header(self) -> Header:
        """Parses the header. PeerError."""
        return take_header(self.data)

    def data_at(self, header: Header) -> int:
        """Returns the offset of the file's encrypted data."""
        return 0 if self.in_xattr else header.header_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def open_lower(name: str | Path, directory: int | None = None) -> LowerFile:
    """Opens a lower file and reads its header. `directory`: a descriptor that `name` is relative to. OSError: also if
    it is a symbolic link or no regular file; NotEncrypted."""
    try:
        fd = os.open(name, _READ, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", os.fspath(name)) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", os.fspath(name))
        data, in_xattr = read_header(fd)
        return LowerFile(fd, found, data, in_xattr)
    except BaseException:
        os.close(fd)
        raise


def read_header(fd: int) -> tuple[bytes, bool]:
    """Returns the bytes that hold the header, and whether they are in the attribute. OSError, NotEncrypted."""
    data = os.pread(fd, MAX_HEADER, 0)
    if has_marker(data):
        return data, False
    try:
        data = os.getxattr(fd, XATTR)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            raise NotEncrypted from None
        raise
    if not has_marker(data):
        raise NotEncrypted
    return data, True


# --- finding them -------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A file that a walk has found. It is opened from `top`, a descriptor of a folder, by the names in `parts`, so
    that no symbolic link can lead elsewhere."""

    path: Path
    top: int
    parts: tuple[str, ...]

    def open(self) -> LowerFile:
        """As `open_lower`."""
        directory, opened = self.top, -1
        try:
            for name in self.parts[:-1]:
                deeper = os.open(name, _FOLDER, dir_fd=directory)
                if opened >= 0:
                    os.close(opened)
                directory = opened = deeper
            return open_lower(self.parts[-1], directory)
        finally:
            if opened >= 0:
                os.close(opened)


class Skipped(NamedTuple):
    """What a walk has passed over, or could not read (`error`)."""

    path: Path
    why: str
    error: OSError | None = None


class Walk:
    """Finds the files at and below a path. `recursive`: also below a folder; `across`: also on other filesystems;
    `closed`: folders that are not entered, with the reason. Keeps a descriptor until `close`. OSError. `is_file`:
    whether the path is no folder."""

    def __init__(
        self, path: Path, recursive: bool, across: bool = False, closed: Collection[tuple[Inode, str]] = ()
    ) -> None:
        directory, name = _open_above(path)
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", str(path))
            self.is_file = not stat.S_ISDIR(found.st_mode)
            if not self.is_file and not recursive:
                raise IsADirectoryError(errno.EISDIR, "is a folder: -r goes through it", str(path))
            self._top = os.dup(directory) if self.is_file else os.open(name, _FOLDER, dir_fd=directory)
        finally:
            os.close(directory)
        folder = Path(os.readlink(f"/proc/self/fd/{self._top}"))  # noqa: PTH115 - not what `path` leads to by now
        self._path = folder / name if self.is_file else folder
        self._across, self._closed = across, dict(closed)
        self._device = os.fstat(self._top).st_dev

    def close(self) -> None:
        os.close(self._top)

    def __iter__(self) -> Iterator[Found | Skipped]:
        if self.is_file:
            yield Found(self._path, self._top, (self._path.name,))
            return
        yield from self._below(self._top, self._path, ())

    def _below(self, directory: int, path: Path, parts: tuple[str, ...]) -> Iterator[Found | Skipped]:
        inode = _inode(os.fstat(directory))
        if inode in self._closed:
            yield Skipped(path, self._closed[inode], OSError(errno.EBUSY, self._closed[inode], str(path)))
            return
        folders = []
        try:
            if len(parts) > _MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, f"is more than {_MAX_DEPTH} folders deep: name one of those in it")
            with os.scandir(directory) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Skipped(path, error.strerror or "", OSError(error.errno, error.strerror, str(path)))
            return
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False):
                yield Found(path / entry.name, self._top, (*parts, entry.name))
            else:
                why = "a symbolic link" if entry.is_symlink() else "no regular file"
                yield Skipped(path / entry.name, why)
        for name in folders:
            try:
                deeper = os.open(name, _FOLDER, dir_fd=directory)
            except OSError as error:
                yield Skipped(
                    path / name, error.strerror or "", OSError(error.errno, error.strerror, str(path / name))
                )
                continue
            try:
                if os.fstat(deeper).st_dev != self._device and not self._across:
                    yield Skipped(path / name, "on another filesystem")
                else:
                    yield from self._below(deeper, path / name, (*parts, name))
            finally:
                os.close(deeper)


def _open_above(path: Path) -> tuple[int, str]:
    """Opens the folder that contains `path`. Returns its descriptor, and the name in it. Symbolic links on the way are
    followed only if they are root's or this user's own: another user could exchange them at any time. OSError."""
    way = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    directory, links = os.open("/" if path.is_absolute() else ".", way), 0
    left = [part for part in reversed(path.parts) if part != "/"] or ["."]
    try:
        while len(left) > 1:
            found = os.open(left.pop(), way, dir_fd=directory)
            directory, before = found, directory
            status = os.fstat(found)
            if not stat.S_ISLNK(status.st_mode):
                os.close(before)
                continue  # what is no folder fails at the next name
            directory = before
            target = os.readlink("", dir_fd=found)
            os.close(found)
            links += 1
            if status.st_uid not in (0, os.geteuid()):
                why = f"a symbolic link of uid {status.st_uid} is on the way, which is not followed"
                raise OSError(errno.ELOOP, why, str(path))
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            left += [part for part in reversed(Path(target).parts) if part != "/"]
            if target.startswith("/"):
                os.close(directory)
                directory = os.open("/", way)
    except BaseException:
        os.close(directory)
        raise
    return directory, left[0]


def _inode(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino
