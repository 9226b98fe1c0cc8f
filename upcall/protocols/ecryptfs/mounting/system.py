"""The system calls of a mounter. Changes this process's ids, keyrings and mount namespace: in a child process only."""

from __future__ import annotations

import contextlib
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
        os.setresuid(requester.uid, 0, 0)  # real: whose keyring it is, and that setns(2) admits this process
        with self._as_user():
            keyring.ensure_user_keyring_linked()
            mounting.enter(requester.pidfd)
        self._theirs = self._process.namespace()

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
            return mounting.lies_within(inner, outer)

    def mount(self, made: Made, request: MountRequest, lower: int, upper: int, noexec: bool) -> int:
        """The detached mount is made in this process's own mount namespace, whose /proc is this process's."""
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
            mount = mounting.create("ecryptfs", str(link), options, attributes)
        finally:
            link.unlink()
        mounting.enter_namespace(self._theirs)
        mounting.attach(mount, upper)
        return mount

    def detach(self, mount: int) -> None:
        self._process.detach(mount)

    def entry(self, parent: int, name: str) -> int:
        with self._as_user():
            return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)

    def is_used(self, parent: int, name: str) -> bool:
        with self._as_user():
            os.fchdir(parent)
            return mounting.is_used(name)
