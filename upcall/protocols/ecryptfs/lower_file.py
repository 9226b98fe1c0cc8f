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
_MAX_DEPTH: Final = 200  # folders below each other; eCryptfs's names are so long that paths end at about forty

Inode = tuple[int | None, int]  # device, None for whichever, and inode number


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
        directory = _open_below(self.top, self.parts[:-1])
        try:
            return open_lower(self.parts[-1], directory)
        finally:
            os.close(directory)


def _open_below(top: int, parts: tuple[str, ...]) -> int:
    """Opens the folder that these names lead to, one by one. OSError: also if one is a symbolic link."""
    here = os.dup(top)
    for name in parts:
        try:
            deeper = os.open(name, _FOLDER, dir_fd=here)
        finally:
            os.close(here)
        here = deeper
    return here


class Skipped(NamedTuple):
    """What a walk has passed over, or could not read (`error`)."""

    path: Path
    why: str
    error: OSError | None = None


class Walk:
    """Finds the files at and below a path. `recursive`: also below a folder; `across`: also on other filesystems;
    `closed`: folders that are not entered, with the reason. Keeps a descriptor until `close`. OSError.

    `is_file`: whether the path is no folder; `top`: a descriptor of the folder, or of the one that the file is in;
    `device`: of that."""

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
            self.top = os.dup(directory) if self.is_file else os.open(name, _FOLDER, dir_fd=directory)
        finally:
            os.close(directory)
        folder = Path(os.readlink(f"/proc/self/fd/{self.top}"))  # noqa: PTH115 - not what `path` leads to by now
        self._path = folder / name if self.is_file else folder
        self._across, self._closed = across, dict(closed)
        self.device = os.fstat(self.top).st_dev

    def close(self) -> None:
        os.close(self.top)

    def __iter__(self) -> Iterator[Found | Skipped]:
        if self.is_file:
            yield Found(self._path, self.top, (self._path.name,))
            return
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            parts = waiting.pop()
            path = self._path.joinpath(*parts)
            try:
                listed = self._listed(parts)
            except OSError as error:
                why = error.strerror or ""
                yield Skipped(path, why, OSError(error.errno, why, str(path)))
                continue
            if isinstance(listed, str):
                yield Skipped(path, listed)
                continue
            for name, kind in listed:
                if kind == stat.S_IFREG:
                    yield Found(path / name, self.top, (*parts, name))
                elif kind != stat.S_IFDIR:
                    yield Skipped(path / name, "a symbolic link" if kind == stat.S_IFLNK else "no regular file")
            waiting += [(*parts, name) for name, kind in reversed(listed) if kind == stat.S_IFDIR]

    def _listed(self, parts: tuple[str, ...]) -> list[tuple[str, int]] | str:
        """Returns the names in a folder with their kinds, or why it is passed over. OSError if that is an error."""
        if len(parts) > _MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"is more than {_MAX_DEPTH} folders deep: name one of those in it")
        folder = _open_below(self.top, parts)
        try:
            found = os.fstat(folder)
            if found.st_dev != self.device and not self._across:
                return "on another filesystem"
            if why := self._closed.get((found.st_dev, found.st_ino)) or self._closed.get((None, found.st_ino)):
                raise OSError(errno.EBUSY, why)
            with os.scandir(folder) as entries:
                return sorted((entry.name, _kind(entry)) for entry in entries)
        finally:
            os.close(folder)


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


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
