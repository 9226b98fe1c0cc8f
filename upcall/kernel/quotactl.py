"""Reads quotas by quotactl(2): usage, limits, grace periods.

Source: quotactl(2), include/uapi/linux/quota.h, fs/quota/quota.c of Linux 6.1. The generic commands (Q_GETINFO,
Q_GETQUOTA, Q_GETNEXTQUOTA) serve XFS as well as ext4, because the kernel converts them. So Q_XGETQUOTA and its like,
whose units differ, are not needed.

Reading a quota of another user, or of a group without being its member, requires CAP_SYS_ADMIN (EPERM).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from typing import Final, Self

from upcall.kernel import libc
from upcall.kernel.mounts import Mount
from upcall.protocols.quota.warning import NOTHING, Figures, Quota

USER, GROUP, PROJECT = range(3)
TYPES: Final = (USER, GROUP, PROJECT)

_QUOTACTL_FD = {"x86_64": 443, "aarch64": 443, "riscv64": 443}.get(platform.machine(), 0)
_GETINFO, _GETQUOTA, _GETNEXTQUOTA = 0x800005, 0x800007, 0x800009
_XGETQSTATV, _STATE_SIZE = 0x5808, 256  # struct fs_quota_statv has 112 bytes; the kernel fills in no more
_BLOCK = 1024  # bytes: QIF_DQBLKSIZE, the unit of limits; usage is in bytes

_DQINFO = struct.Struct("=2QII")  # struct if_dqinfo
_DQBLK = struct.Struct("=8QII")  # struct if_dqblk; in struct if_nextdqblk its padding is the id

_KNOWING = frozenset({"ext2", "ext3", "ext4", "xfs", "f2fs", "jfs", "reiserfs", "gfs2", "ocfs2", "tmpfs", "bcachefs"})


class Filesystem:
    """An open mount point (O_PATH), and quotactl on it. OSError as quotactl(2): ESRCH if quotas are off.

    It cannot be unmounted while it is open: use it in a `with` block, for a few calls.
    """

    def __init__(self, mount: str, device: str) -> None:
        """`mount`: the mount point. `device`: for read-only mounts, and kernels older than 5.14. OSError."""
        self.fd = os.open(mount, os.O_PATH | os.O_CLOEXEC)
        self._device = os.fsencode(device)

    def number(self) -> int:
        """Returns the device number of the opened filesystem; another one may have been mounted over it since."""
        return os.fstat(self.fd).st_dev

    def get(self, kind: int, number: int) -> Quota:
        """Returns the quota of one id. XFS has no entry for an id without files: then usage and limits are 0."""
        try:
            return self._quota(_GETQUOTA, kind, number)
        except FileNotFoundError:
            return Quota(number, NOTHING, NOTHING)

    def next(self, kind: int, number: int) -> Quota | None:
        """Returns the quota with the next id from `number` on; None after the last. Root only."""
        try:
            return self._quota(_GETNEXTQUOTA, kind, number)
        except FileNotFoundError:
            return None

    def grace(self, kind: int) -> tuple[int, int]:
        """Returns the grace periods of the soft limits of space and of files, in seconds."""
        buffer = ctypes.create_string_buffer(_DQINFO.size)
        self._call(_GETINFO, kind, 0, buffer)
        space, files, _, _ = _DQINFO.unpack(buffer.raw)
        return space, files

    def enforced(self) -> tuple[int, ...]:
        """Returns the kinds of quota whose limits are enforced. Quotas that are only counted, as on ext4 mounted
        without usrquota, cause no errors and no warnings."""
        buffer = ctypes.create_string_buffer(b"\x01", _STATE_SIZE)  # FS_QSTATV_VERSION1
        self._call(_XGETQSTATV, USER, 0, buffer)
        flags = struct.unpack_from("=H", buffer, 2)[0]
        return tuple(kind for kind in TYPES if flags & 2 << 2 * kind)  # FS_QUOTA_UDQ_ENFD, _GDQ_ENFD, _PDQ_ENFD

    def _quota(self, command: int, kind: int, number: int) -> Quota:
        buffer = ctypes.create_string_buffer(_DQBLK.size)
        self._call(command, kind, number, buffer)
        b_hard, b_soft, b_used, i_hard, i_soft, i_used, b_time, i_time, _, found = _DQBLK.unpack(buffer.raw)
        space = Figures(b_used, b_soft * _BLOCK, b_hard * _BLOCK, b_time)
        return Quota(found if command == _GETNEXTQUOTA else number, space, Figures(i_used, i_soft, i_hard, i_time))

    def _call(self, command: int, kind: int, number: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        whole = command << 8 | kind
        if _QUOTACTL_FD:
            try:
                libc.syscall(_QUOTACTL_FD, self.fd, whole, number, buffer)
            except OSError as error:
                # EROFS: by descriptor the kernel requires a writable mount, also for reading (quotactl_cmd_write), and
                # a service's sandbox has few. By device it checks no mount.
                if error.errno not in (errno.ENOSYS, errno.EROFS):
                    raise
            else:
                return
        libc.call("quotactl", ctypes.c_uint(whole), self._device, ctypes.c_uint(number), buffer)

    def close(self) -> None:
        """Closes the mount point. May be repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(mount: Mount) -> Filesystem:
    """Opens the filesystem of a mount. OSError; ESTALE if another one is mounted over it."""
    found = Filesystem(mount.point, mount.source)
    if found.number() != mount.device:
        found.close()
        raise OSError(errno.ESTALE, "something else is mounted above it", mount.point)
    return found


def with_quotas(mounts: Iterable[Mount]) -> dict[Mount, tuple[int, ...]]:
    """Returns the mounts with enforced quotas, one per filesystem, and the kinds that are enforced.

    Filesystem types without quotas are not opened: a network filesystem without its server would block.
    """
    found: dict[int, tuple[Mount, tuple[int, ...]]] = {}
    for mount in sorted(mounts, key=lambda one: one.root != "/"):
        if mount.type not in _KNOWING or mount.device in found:
            continue
        try:
            with opened(mount) as filesystem:
                kinds = filesystem.enforced()
        except OSError:
            continue
        if kinds:
            found[mount.device] = mount, kinds
    return dict(found.values())
