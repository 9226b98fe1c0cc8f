"""The system calls of a mounter. Changes this process's ids, keyrings and mount namespace: in a child process only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from upcall.kernel import keyring, libc, mounting
from upcall.kernel.mounting import Option, OwnProcess
from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs.mounting.messages import Made, MountRequest
from upcall.protocols.ecryptfs.mounting.requester import MountRequester

_CIPHER = "aes"  # that of new files; the header of each file says its own


class System:
    """Implements Mounting. `folder`: root's own, for a link whose name becomes the source of the mount."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._process = OwnProcess()
        self._home = self._process.namespace()
        self._theirs = -1
        self._uid = 0

    def enter(self, requester: MountRequester) -> None:
        # What is imported later would come from files of the other namespace.
        sys.meta_path.clear()
        sys.path.clear()
        self._uid = requester.uid
        os.setgroups([])
        os.setresgid(requester.gid, requester.gid, requester.gid)
        with self._real_uid(), self._as_user():  # whose keyring it is; setns(2) admits this process to its equals
            keyring.ensure_user_keyring_linked()
            mounting.enter(requester.pidfd)
        self._theirs = self._process.namespace()

    @contextlib.contextmanager
    def _real_uid(self) -> Iterator[None]:
        """A context in which the real uid is the user's. The user can signal this process in it, and stop or end it
        (kill(2)): nothing that was checked before may be relied on after it."""
        os.setresuid(self._uid, 0, 0)
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)

    @contextlib.contextmanager
    def _as_user(self) -> Iterator[None]:
        """A context in which files are accessed with the user's rights."""
        libc.call("setfsuid", self._uid)
        try:
            yield
        finally:
            libc.call("setfsuid", 0)

    def owns_namespace(self) -> bool:
        return self._process.owns_namespace()

    def mounts(self) -> Mapping[int, Mount]:
        return self._process.mounts()

    def is_folder(self, fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)

    def mount_id(self, fd: int) -> int:
        return self._process.mount_id(fd)

    def path(self, fd: int) -> str:
        return self._process.path(fd)

    def stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def parent(self, mount: int) -> int:
        with self._as_user():
            return os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)

    def is_empty(self, folder: int) -> bool:
        with self._as_user():
            return mounting.is_empty(folder)

    def lies_within(self, inner: int, outer: int) -> bool:
        with self._as_user():
            mounts = self.mounts()
            return mounting.lies_within(inner, outer, lambda above: self._check_above(above, mounts))

    def _check_above(self, folder: int, mounts: Mapping[int, Mount]) -> None:
        """OSError if a folder is on a FUSE of a user's, which answers when it wants to. Does not ask it."""
        mount = mounts.get(self.mount_id(folder))
        if mount is None or mount.is_users_fuse:
            where = "was mounted meanwhile" if mount is None else f"is on {mount.type}, which cannot be used"
            raise OSError(errno.EXDEV, f"a folder above {where}")

    def open_entry(self, folder: int, name: str) -> int:
        with self._as_user():
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)

    def root(self) -> int:
        return os.open("/", os.O_PATH | os.O_CLOEXEC)

    def create(self, made: Made, request: MountRequest, lower: int, noexec: bool) -> int:
        """The detached mount is made in this process's own mount namespace, whose /proc is this process's. The real
        uid is the one to which `ecryptfs_check_dev_ruid` compares the folder's owner."""
        options: list[Option] = [("ecryptfs_sig", one) for one in request.signatures]
        options += [("ecryptfs_cipher", _CIPHER), ("ecryptfs_key_bytes", str(request.key_bytes))]
        if request.names_signature:
            options.append(("ecryptfs_fnek_sig", request.names_signature))
        options.append(("ecryptfs_check_dev_ruid", None))
        attributes = mounting.NOSUID | mounting.NODEV | (mounting.NOEXEC if noexec else 0)
        mounting.enter_namespace(self._home)
        os.fchdir(self._folder)
        link = Path(str(made))
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/self/fd/{lower}")
        try:
            with self._real_uid():
                mount = mounting.create("ecryptfs", str(link), options, attributes)
        finally:
            link.unlink()
        mounting.enter_namespace(self._theirs)
        return mount

    def options(self, mount: int) -> frozenset[str]:
        flags = os.fstatvfs(mount).f_flag
        names = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
        return frozenset(name for name, flag in names.items() if flags & flag)

    def attach(self, mount: int, upper: int) -> None:
        mounting.attach(mount, upper)

    def detach(self, mount: int) -> None:
        self._process.detach(mount)

    def expire(self, parent: int, name: str) -> None:
        with self._as_user():
            mounting.expire(parent, name)
