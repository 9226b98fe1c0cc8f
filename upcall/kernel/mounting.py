"""Mounts and unmounts by descriptor, in a given mount namespace.

A mount is made detached (fsopen, fsconfig, fsmount) and then attached to an open folder (move_mount): no path of the
target is resolved. Source: fsopen(2), move_mount(2), umount2(2), setns(2), ioctl_ns(2); Linux 5.8 for `enter`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from upcall.kernel import libc
from upcall.kernel.mounts import Mount, numbered_mounts

# The same on all architectures.
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC: Final = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
NOSUID, NODEV, NOEXEC = 0x2, 0x4, 0x8  # MOUNT_ATTR_*
_F_EMPTY_PATH, _T_EMPTY_PATH = 0x4, 0x40  # MOVE_MOUNT_*
_DETACH, _EXPIRE, _NOFOLLOW = 0x2, 0x4, 0x8  # MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW
_NEWNS: Final = 0x00020000
_NS_GET_USERNS: Final = 0xB701
_MNT_ID: Final = re.compile(rb"^mnt_id:\t(\d+)$", re.MULTILINE)
_MOST: Final = 4 << 20  # bytes of a mountinfo

Option = tuple[str, str | None]  # name and value; None: a flag


def create(filesystem: str, source: str, options: Sequence[Option], attributes: int) -> int:
    """Makes a detached mount and returns its descriptor. `attributes`: NOSUID, NODEV, NOEXEC. OSError: from the
    filesystem, or ENODEV if the kernel does not have it."""
    context = libc.syscall(_FSOPEN, _text(filesystem), _CLOEXEC, about=filesystem)
    try:
        for name, value in (("source", source), *options):
            kind = _SET_FLAG if value is None else _SET_STRING
            libc.syscall(_FSCONFIG, context, kind, _text(name), None if value is None else _text(value), 0, about=name)
        libc.syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0, about=filesystem)
        return libc.syscall(_FSMOUNT, context, _CLOEXEC, attributes, about=filesystem)
    finally:
        os.close(context)


def attach(mount: int, folder: int) -> None:
    """Attaches a detached mount to the folder of an O_PATH descriptor. OSError EINVAL if the folder is not in this
    process's mount namespace."""
    libc.syscall(_MOVE_MOUNT, mount, _text(""), folder, _text(""), _F_EMPTY_PATH | _T_EMPTY_PATH)


def expire(folder: int, name: str) -> None:
    """Marks what is mounted on the entry `name` of a folder, and raises OSError EAGAIN; or, if it has a mark and was
    not used since, unmounts it. OSError EBUSY, and no mark, if it is in use. Changes the working directory."""
    os.fchdir(folder)
    libc.call("umount2", os.fsencode(name), _EXPIRE | _NOFOLLOW)


def enter(pidfd: int) -> None:
    """Enters the mount namespace of a process; its root becomes this process's root and working directory.

    OSError EPERM unless this process may inspect that one: its real uid and gid must be all of that one's, or it needs
    CAP_SYS_PTRACE. Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT."""
    libc.call("setns", pidfd, _NEWNS)


enter_namespace = enter  # of a descriptor of the namespace itself


def _text(text: str) -> ctypes.c_char_p:
    return ctypes.c_char_p(os.fsencode(text))


class OwnProcess:
    """This process's folder in /proc, opened once: it stays usable in another mount namespace, whose /proc may be
    another. Not across fork."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def mount_id(self, fd: int) -> int:
        """Returns the id of the mount that a descriptor lies on. Does not ask the filesystem. OSError."""
        found = _MNT_ID.search(self._read(f"fdinfo/{fd}", 4096))
        if found is None:
            raise OSError("no mnt_id in fdinfo")
        return int(found[1])

    def path(self, fd: int) -> str:
        """Returns the path of a descriptor below the current root, as the kernel writes it. OSError."""
        return os.readlink(f"fd/{fd}", dir_fd=self._fd)

    def detach(self, fd: int) -> None:
        """Takes away the mount of whose root this is a descriptor, in use or not, wherever it has been moved; but
        if something was mounted on its root, that. Changes the working directory. OSError."""
        os.fchdir(self._fd)
        libc.call("umount2", f"fd/{fd}".encode(), _DETACH)

    def mounts(self) -> dict[int, Mount]:
        """Returns the mounts in the current mount namespace by id. OSError."""
        return numbered_mounts(self._read("mountinfo", _MOST))

    def namespace(self) -> int:
        """Returns a descriptor of the current mount namespace."""
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)

    def owns_namespace(self) -> bool:
        """Returns whether this process's user namespace owns its current mount namespace. Others were made by users
        in user namespaces of their own (unshare -Urm)."""
        with _closed(self.namespace()) as namespace, _closed(fcntl.ioctl(namespace, _NS_GET_USERNS)) as owner:
            found = os.fstat(owner)
            mine = os.stat("ns/user", dir_fd=self._fd)
            return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def _read(self, name: str, most: int) -> bytes:
        with _closed(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)) as fd:
            data = b""
            while chunk := os.read(fd, 1 << 16):
                data += chunk
                if len(data) > most:
                    raise OSError(f"{name}: more than {most} bytes")
            return data


@contextlib.contextmanager
def _closed(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def is_empty(folder: int) -> bool:
    """Returns whether the folder of an O_PATH descriptor is empty. OSError."""
    with _closed(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)) as fd, os.scandir(fd) as it:
        return next(it, None) is None


def lies_within(inner: int, outer: int, check: Callable[[int], None] = lambda _: None, most: int = 256) -> bool:
    """Returns whether the folder `inner` is `outer` or below it; both O_PATH descriptors. `check` is called with a
    descriptor of each folder above, before its filesystem is asked, and may raise. OSError; also if `inner` is more
    than `most` folders deep."""
    wanted = _identity(outer)
    here = os.dup(inner)
    try:
        for _ in range(most):
            if _identity(here) == wanted:
                return True
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            below, here = here, above
            try:
                check(above)
                at_root = _identity(above) == _identity(below)
            finally:
                os.close(below)
            if at_root:
                return False
    finally:
        os.close(here)
    raise OSError(f"more than {most} folders deep")


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def is_path_of_folder(fd: int) -> bool:
    """Returns whether this is an O_PATH descriptor of a folder. Asks the filesystem for nothing but its type."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH) and stat.S_ISDIR(os.fstat(fd).st_mode)
