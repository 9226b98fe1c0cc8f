"""Checks a request and mounts or unmounts, in a child process of the source that does this once and ends.

Everything is decided by the descriptors that the user has sent. No path of the user's is resolved: the lower folder is
passed to eCryptfs as /proc/self/fd/N, and the mount is attached to the descriptor of the upper one. The filesystem of
a descriptor is known from mountinfo before anything is asked of it, because a user's own FUSE could keep this process
waiting for ever.

The source of the mount, "upcall:UID:NAME" in mountinfo, says for whom it was made: this is the only record, kept by
the kernel, and only root can mount with a source of that form.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs.mounting.denied import FAILED, LATER, NOT_PERMITTED, UNAVAILABLE, WRONG, Denied
from upcall.protocols.ecryptfs.mounting.messages import MOUNT, Made, MountRequest, take_made
from upcall.protocols.ecryptfs.mounting.requester import MountRequester

ECRYPTFS: Final = "ecryptfs"
# Filesystems of this machine's own disks and memory. eCryptfs does not work on those of a network; those of a process
# (FUSE) answer when the process wants to; the kernel's own (proc, sysfs, cgroup) have no files to encrypt.
LOWER: Final = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "reiserfs", "tmpfs", "xfs", "zfs"}
)
# A mount can lie on these, too, besides; nothing is read from them but whether the folder is empty.
UPPER: Final = LOWER | {"nfs", "nfs4", "overlay"}
_STEPS: Final = 8  # of unmounting what somebody may look at meanwhile


class Mounting(Protocol):
    """The system calls of a mounter: `System`, or a test double. Methods raise OSError."""

    def enter(self, requester: MountRequester) -> None:
        """Takes the requester's real ids and user keyring, and enters its mount namespace."""

    def owns_namespace(self) -> bool: ...

    def mounts(self) -> Mapping[int, Mount]:
        """Returns the mounts of the namespace by id."""

    def is_folder(self, fd: int) -> bool:
        """Returns whether this is an O_PATH descriptor. Does not ask the filesystem."""

    def mount_id(self, fd: int) -> int:
        """Returns the mount that a descriptor lies on. Does not ask the filesystem."""

    def path(self, fd: int) -> str: ...

    def stat(self, fd: int, /) -> os.stat_result: ...

    def parent(self, mount: int, /) -> int:
        """Returns a descriptor of the folder that contains the mount point of a mount's root."""

    def is_empty(self, folder: int, /) -> bool: ...

    def lies_within(self, inner: int, outer: int, /) -> bool: ...

    def root(self) -> int:
        """Returns a descriptor of the namespace's root folder."""

    def open_entry(self, folder: int, name: str, /) -> int:
        """Returns an O_PATH descriptor of an entry, or of what is mounted on it; a link is not followed. Does not ask
        what is mounted there."""

    def create(self, made: Made, request: MountRequest, lower: int, noexec: bool, /) -> int:
        """Makes a detached mount with nosuid, nodev and, if wanted, noexec; returns its descriptor. The user can stop
        this process meanwhile."""

    def options(self, mount: int, /) -> frozenset[str]:
        """Returns which of nosuid, nodev and noexec a mount has."""

    def attach(self, mount: int, upper: int, /) -> None: ...

    def detach(self, mount: int, /) -> None:
        """Takes away the mount of a descriptor, in use or not."""

    def expire(self, parent: int, name: str, /) -> None:
        """Marks what is mounted on the entry `name` of the folder `parent`, with OSError EAGAIN; or unmounts it if it
        has a mark and was not used since. OSError EBUSY if it is in use."""


class Mounter:
    """Serves one request. `most`: mounts that a user may have."""

    def __init__(self, system: Mounting, most: int) -> None:
        self._system, self._most = system, most

    def serve(self, request: MountRequest, requester: MountRequester, folders: list[int]) -> str:
        """Mounts or unmounts; returns the path of the upper folder. Denied. Takes the descriptors over."""
        system = self._system
        if not all(system.is_folder(fd) for fd in folders):
            raise Denied(WRONG, "the request has other descriptors than those of folders")
        try:
            system.enter(requester)
            owned = system.owns_namespace()
        except OSError as error:
            raise Denied(
                NOT_PERMITTED,
                f"the mount namespace of the process that asked cannot be entered ({error.strerror}): it is in a user "
                "namespace of its own, or runs with other rights than yours",
            ) from None
        if not owned:
            raise Denied(
                NOT_PERMITTED,
                "the process that asked is in a mount namespace of its own (unshare, a container): ask from outside",
            )
        if request.kind == MOUNT:
            return self._mount(request, requester, *folders)
        return self._unmount(request, requester, folders)

    # --- mounting ------------------------------------------------------------------------------------------

    def _mount(self, request: MountRequest, requester: MountRequester, lower: int, upper: int) -> str:
        """Everything is checked before the mount is made, and again before it is attached: between these the user can
        stop this process (`Mounting.create`). What is attached has its options already."""
        system = self._system
        self._check_folders(requester, lower, upper)
        mounts = system.mounts()
        self._check_number(request, requester, mounts)
        made = Made(requester.uid, request.name)
        # Programs in the mount are those in the lower folder.
        noexec = any("noexec" in mounts[system.mount_id(fd)].options for fd in (lower, upper))
        wanted = {"nosuid", "nodev", *(["noexec"] if noexec else [])}
        about = f"{_shown(system.path(lower))} on {_shown(system.path(upper))}"
        with _explained(about):
            mount = system.create(made, request, lower, noexec)
            if not wanted <= system.options(mount):
                raise Denied(FAILED, f"the kernel has not set all of {', '.join(sorted(wanted))}")
        upper_path = self._check_folders(requester, lower, upper)
        with _explained(about):
            system.attach(mount, upper)
            try:
                self._verify(mount, made, upper_path)
            except BaseException:
                system.detach(mount)
                raise
        return upper_path

    def _check_folders(self, requester: MountRequester, lower: int, upper: int) -> str:
        """Returns the path of the upper folder. Denied unless the one may be mounted on the other."""
        system = self._system
        mounts = system.mounts()
        lower_path = self._checked("lower", lower, requester.uid, mounts, LOWER)
        upper_path = self._checked("upper", upper, requester.uid, mounts, UPPER)
        if any(mount.point == upper_path for mount in mounts.values()):
            raise Denied(LATER, f"{_shown(upper_path)}: something is mounted there already: see `upcall mounts`")
        with _explained("the folders cannot be compared"):
            if system.lies_within(upper, lower) or system.lies_within(lower, upper):
                raise Denied(WRONG, f"{_shown(lower_path)} and {_shown(upper_path)}: one folder lies within the other")
        with _explained(_shown(upper_path)):
            if not system.is_empty(upper):
                raise Denied(
                    WRONG,
                    f"{_shown(upper_path)}: is not empty, and a mount would hide its files: choose an empty folder",
                )
        return upper_path

    def _checked(
        self, which: str, fd: int, uid: int, mounts: Mapping[int, Mount], allowed: frozenset[str]
    ) -> str:  # fmt: skip
        """Returns the path of a folder, for people. Denied unless it is the user's own folder, which others cannot
        write to, on a filesystem that is allowed."""
        system = self._system
        mount = mounts.get(system.mount_id(fd))
        path = system.path(fd)
        shown = _shown(path)
        if mount is None:
            raise Denied(NOT_PERMITTED, f"the {which} folder is not in the mount namespace of the process that asked")
        if which == "upper" and mount.point == path and mount.type in {ECRYPTFS, *allowed}:
            raise Denied(
                LATER, f"{shown}: is a mount already: `upcall mounts` shows yours, `upcall umount` takes one away"
            )
        if mount.type not in allowed:
            raise Denied(
                NOT_PERMITTED,
                f"{shown}: the {which} folder is on {mount.type}, which cannot be used: choose one on a disk",
            )
        if which == "lower" and "ro" in mount.options:
            # eCryptfs makes and removes entries without mnt_want_write() of the lower mount (fs/ecryptfs/inode.c): a
            # read-only bind mount would not prevent that.
            raise Denied(NOT_PERMITTED, f"{shown}: is mounted read-only: choose a lower folder that can be written to")
        with _explained(shown):
            found = system.stat(fd)
        if not stat.S_ISDIR(found.st_mode):
            raise Denied(WRONG, f"{shown}: is not a folder")
        if not found.st_nlink:
            raise Denied(WRONG, f"{shown}: the folder has been removed")
        if found.st_uid != uid:
            raise Denied(
                NOT_PERMITTED, f"{shown}: belongs to uid {found.st_uid}: both folders must be your own (uid {uid})"
            )
        if found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            raise Denied(NOT_PERMITTED, f"{shown}: mode {mode:04o} lets others write to it: chmod go-w it")
        return path

    def _check_number(self, request: MountRequest, requester: MountRequester, mounts: Mapping[int, Mount]) -> None:
        mine = [made for made in map(_made, mounts.values()) if made is not None and made.uid == requester.uid]
        if any(made.name == request.name for made in mine):
            raise Denied(LATER, f"{request.name}: is mounted already: see `upcall mounts`")
        if len(mine) >= self._most:
            raise Denied(LATER, f"you have {len(mine)} mounts, and may have {self._most}: `upcall umount` one of them")

    def _verify(self, fd: int, made: Made, upper_path: str) -> None:
        """Denied unless the mount is where it was meant to be."""
        found = self._system.mounts().get(self._system.mount_id(fd))
        if found is None or _made(found) != made or found.point != upper_path:
            where = "nowhere" if found is None else _shown(found.point)
            raise Denied(LATER, f"{_shown(upper_path)}: was moved meanwhile (the mount was {where}): try again")

    # --- unmounting ----------------------------------------------------------------------------------------

    def _unmount(self, request: MountRequest, requester: MountRequester, folders: list[int]) -> str:
        """umount2(2) takes what lies on top, so nothing may lie on, or in, the mount. If it is to go although it is
        in use, it is named by its own descriptor, and cannot be another."""
        system = self._system
        (fd,) = folders
        number = system.mount_id(fd)
        mounts = system.mounts()
        mount = mounts.get(number)
        made = None if mount is None else _made(mount)
        if mount is None or made is None or system.path(fd) != mount.point:
            raise Denied(NOT_PERMITTED, f"{_shown(system.path(fd))}: is not a mount that `upcall mount` has made")
        if requester.uid != made.uid:
            raise Denied(NOT_PERMITTED, f"{_shown(mount.point)}: was mounted for uid {made.uid}, not for you")
        if made.name != request.name:
            raise Denied(WRONG, f"{_shown(mount.point)}: is the mount {made.name}: `upcall umount {made.name}`")
        if any(other is not mount and _hinders(other, mount, made.uid) for other in mounts.values()):
            raise Denied(LATER, f"{_shown(mount.point)}: something else is mounted on it or in it: unmount that first")
        with _explained(_shown(mount.point)):
            if request.lazy:
                system.detach(fd)
                os.close(folders.pop())
            else:
                self._unmount_unused(number, mounts, made, folders)
        left = system.mounts().get(number)
        if left is not None and _made(left) == made:
            raise Denied(LATER, f"{_shown(mount.point)}: was moved meanwhile, and is still mounted: try again")
        return mount.point

    def _unmount_unused(self, number: int, mounts: Mapping[int, Mount], made: Made, folders: list[int]) -> None:
        """Unmounts exactly this mount if nobody uses it.

        Its own descriptor, even with O_PATH, would keep it busy. So it is named by an entry of the folder that
        contains the mount point; and the user can rename that entry, in another mount namespace, and give its name to
        the mount point of another mount. Two things prevent that the other one goes. Whatever could get the name is
        held open, hence busy. What was mounted since is found in mountinfo after the first step, which only leaves a
        mark, and has no mark at the second step, which takes only what has one."""
        system = self._system
        shown = _shown(mounts[number].point)
        parent, name = system.parent(folders[0]), Path(mounts[number].point).name
        held = self._hold(mounts, number, made.uid)
        try:
            os.close(folders.pop())
            for _ in range(_STEPS):
                try:
                    system.expire(parent, name)
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        break
                    if error.errno != errno.EAGAIN:
                        raise
                    if system.mounts() != mounts:
                        raise Denied(LATER, f"{shown}: mounts have changed meanwhile: try again") from None
                else:
                    return
        finally:
            for one in held:
                os.close(one)
        raise Denied(LATER, f"{shown}: is in use: end what uses it, or `upcall umount --lazy {made.name}`")

    def _hold(self, mounts: Mapping[int, Mount], number: int, uid: int) -> list[int]:
        """Opens the other mounts to whose points the user could give another name: those on the same mount as `number`
        of which a folder above is the user's, or others can write to it. Denied if one cannot be found."""
        held: list[int] = []
        try:
            for one, mount in mounts.items():
                if one == number or mount.parent != mounts[number].parent:
                    continue
                fd = self._open_changeable(mount.point, uid, mounts)
                if fd < 0:
                    continue
                held.append(fd)
                if self._system.mount_id(fd) != _top(mounts, one):
                    raise Denied(LATER, f"{_shown(mount.point)}: was moved meanwhile: try again")
        except BaseException as error:
            for fd in held:
                os.close(fd)
            if isinstance(error, OSError):
                raise Denied(LATER, f"{_shown(mount.point)}: was moved meanwhile: try again") from None
            raise
        return held

    def _open_changeable(self, path: str, uid: int, mounts: Mapping[int, Mount]) -> int:
        """Returns a descriptor of what is mounted at a path; -1 if the user can change no folder above, or only some
        that cannot be reached, behind another mount or another user's folder. OSError."""
        system = self._system
        here, changeable = system.root(), False
        parts = Path(path).parts[1:]
        try:
            for number, part in enumerate(parts, 1):
                above = mounts.get(system.mount_id(here))
                if above is None or (above.is_users_fuse and (changeable or f"user_id={uid}" in above.options)):
                    raise OSError(f"{path}: something was mounted above")
                if above.is_users_fuse:
                    return -1
                found = system.stat(here)
                try:
                    below = system.open_entry(here, part)
                except OSError:
                    if changeable or found.st_uid == uid:
                        raise
                    return -1
                os.close(here)
                here = below
                # In a folder like /tmp, entries of others cannot be renamed. Whose a mount point is cannot be seen.
                fixed = found.st_mode & stat.S_ISVTX and number < len(parts)
                changeable = changeable or found.st_uid == uid or bool(found.st_mode & 0o022 and not fixed)
            return os.dup(here) if changeable else -1
        finally:
            os.close(here)


def _hinders(other: Mount, mount: Mount, uid: int) -> bool:
    """Returns whether another mount lies on a mount, or in it, and would go with it. A FUSE of the same user's may."""
    if other.point == mount.point:
        return True
    is_mine = other.is_users_fuse and f"user_id={uid}" in other.options
    return other.point.startswith(f"{mount.point}/") and not is_mine


def _top(mounts: Mapping[int, Mount], number: int) -> int:
    """Returns the mount that lies on top of a mount's root."""
    for one, mount in mounts.items():
        if one != number and mount.parent == number and mount.point == mounts[number].point:
            return _top(mounts, one)
    return number


def _made(mount: Mount) -> Made | None:
    return take_made(mount.source) if mount.type == ECRYPTFS else None


def _shown(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path)


_KERNEL: Final = {
    errno.ENODEV: (UNAVAILABLE, "the kernel has no eCryptfs: as root, `modprobe ecryptfs`"),
    errno.ENOKEY: (
        UNAVAILABLE,
        "the key's auth token is not in your user keyring: `upcall key add` puts it there",
    ),
    errno.ENOENT: (UNAVAILABLE, "the kernel did not find the key's auth token, or a cipher: `upcall doctor`"),
    errno.EINVAL: (FAILED, "the kernel refused the mount: its log (dmesg) says why"),
}


@contextlib.contextmanager
def _explained(about: str) -> Iterator[None]:
    """Turns an OSError into Denied."""
    try:
        yield
    except OSError as error:
        status, text = _KERNEL.get(error.errno or 0, (FAILED, f"{error.strerror or error}"))
        raise Denied(status, f"{about}: {text}") from None
