"""Quotas as the kernel keeps them: how much is used, what is allowed, how long one may be over.

Source: quotactl(2), include/uapi/linux/quota.h, fs/quota/quota.c of Linux 6.1. The generic commands (Q_GETINFO,
Q_GETQUOTA, Q_GETNEXTQUOTA) serve XFS as well as ext4: the kernel turns them into what the filesystem has. So
Q_XGETQUOTA and its like are not needed, whose units differ.

Whoever asks for a quota that is neither his own nor of a group of his needs CAP_SYS_ADMIN: EPERM.
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

    While it is open nobody can unmount it: for a few calls in a `with` block, no longer.
    """

    def __init__(self, mount: str, device: str) -> None:
        """`device`: for mounts that are read-only, and for kernels older than 5.14."""
        self.fd = os.open(mount, os.O_PATH | os.O_CLOEXEC)
        self._device = os.fsencode(device)

    def number(self) -> int:
        """The device number of what is mounted there: something else may lie above it by now."""
        return os.fstat(self.fd).st_dev

    def get(self, kind: int, number: int) -> Quota:
        """Of one id. XFS knows nobody who has nothing there: nothing is used, and nothing is limited."""
        try:
            return self._quota(_GETQUOTA, kind, number)
        except FileNotFoundError:
            return Quota(number, NOTHING, NOTHING)

    def next(self, kind: int, number: int) -> Quota | None:
        """The quota with the next id, `number` included; None after the last. Root's right."""
        try:
            return self._quota(_GETNEXTQUOTA, kind, number)
        except FileNotFoundError:
            return None

    def grace(self, kind: int) -> tuple[int, int]:
        """For how many seconds somebody may be over a soft limit of space, and of files."""
        buffer = ctypes.create_string_buffer(_DQINFO.size)
        self._call(_GETINFO, kind, 0, buffer)
        space, files, _, _ = _DQINFO.unpack(buffer.raw)
        return space, files

    def enforced(self) -> tuple[int, ...]:
        """The kinds of quota whose limits hold here. Those that are only counted, as on ext4 mounted without
        usrquota, stop nobody and warn of nothing."""
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
                # EROFS: by descriptor the kernel wants a mount that may be written to, also for reading
                # (quotactl_cmd_write), and in a service's sandbox few are. By device it looks at no mount.
                if error.errno not in (errno.ENOSYS, errno.EROFS):
                    raise
            else:
                return
        libc.call("quotactl", ctypes.c_uint(whole), self._device, ctypes.c_uint(number), buffer)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(mount: Mount) -> Filesystem:
    """The filesystem that is mounted there. OSError; ESTALE if another one lies above it."""
    found = Filesystem(mount.point, mount.source)
    if found.number() != mount.device:
        found.close()
        raise OSError(errno.ESTALE, "something else is mounted above it", mount.point)
    return found


def with_quotas(mounts: Iterable[Mount]) -> dict[Mount, tuple[int, ...]]:
    """Those on which quotas hold, each filesystem once, and which kinds.

    Types that know no quotas are not touched: on a network filesystem whose server is gone that would hang.
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
