"""Reads and drops this thread's capabilities.

Source: capabilities(7), capset(2), prctl(2), include/uapi/linux/capability.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Collection
from typing import Final

from upcall.kernel import libc, procfs

# By number.
NAMES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

_HEADER, _VERSION_3 = struct.Struct("=Ii"), 0x20080522
_SETS = struct.Struct("=6I")  # effective, permitted, inheritable: the lower halves, then the upper ones
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _CLEAR_ALL = 24, 47, 4


def effective() -> frozenset[str]:
    """Returns the names of this thread's effective capabilities; those of a newer kernel by number."""
    found, _ = _get()
    return frozenset(_name(number) for number in range(64) if found >> number & 1)


def keep_only(names: Collection[str]) -> frozenset[str]:
    """Drops all other capabilities, for this thread and what it starts. With NO_NEW_PRIVS, executing a file does not
    restore them. Returns the effective ones, which are more if a service manager's filter prevents dropping."""
    kept = sum(1 << NAMES.index(name) for name in names)
    with contextlib.suppress(OSError):
        libc.call("prctl", _PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    for number in range(_last() + 1):
        if not kept >> number & 1:
            with contextlib.suppress(OSError):  # EPERM without SETPCAP
                libc.call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    left = _get()[1] & kept
    low, high = left & 0xFFFFFFFF, left >> 32
    with contextlib.suppress(OSError):
        libc.call("capset", _HEADER.pack(_VERSION_3, 0), _SETS.pack(low, low, 0, high, high, 0))
    return effective()


def _get() -> tuple[int, int]:
    """Returns (effective, permitted) as bit masks."""
    header, sets = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0)), ctypes.create_string_buffer(_SETS.size)
    libc.call("capget", header, sets)
    words = _SETS.unpack(sets.raw)
    return words[0] | words[3] << 32, words[1] | words[4] << 32


def _name(number: int) -> str:
    return NAMES[number] if number < len(NAMES) else str(number)


def _last() -> int:
    try:
        return int(procfs.LAST_CAPABILITY.read_bytes())
    except (OSError, ValueError):
        return len(NAMES) - 1
