"""System calls that this process and all that it starts can never make again: a filter for seccomp(2).

A list of what is refused, in the spirit of what systemd's `SystemCallFilter=@system-service` less `@privileged` leaves
out: what looks into other processes, mounts, makes namespaces, changes the machine, or is new and large enough to be
the way into many a kernel. What a plugin may need, it keeps.

The filter is a binary tree over the numbers: seven comparisons, and from Linux 5.11 on none for what is always
allowed, because the kernel keeps a bitmap of that.
Source: seccomp(2), include/uapi/linux/{seccomp,filter,audit}.h; the numbers are those of asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

# By name, the numbers on x86_64 and aarch64; 0: there is none.
PROCESSES: Final = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
}
MOUNTS: Final = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
}
KERNEL: Final = {
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "modify_ldt": (154, 0),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "sysfs": (139, 0),
    "uselib": (134, 0),
    "_sysctl": (156, 0),
    "mbind": (237, 235),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
}
MACHINE: Final = {
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, 0),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "iopl": (172, 0),
    "ioperm": (173, 0),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
}
IDS: Final = {
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setgroups": (116, 159),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "capset": (126, 91),
}
QUOTA: Final = {"quotactl": (179, 60), "quotactl_fd": (443, 443)}
NAMED: Final[Mapping[str, tuple[int, int]]] = {**PROCESSES, **MOUNTS, **KERNEL, **MACHINE, **IDS, **QUOTA}
UNIX_AND_NETLINK: Final = frozenset({int(socket.AF_UNIX), int(socket.AF_NETLINK)})
AND_INTERNET: Final = UNIX_AND_NETLINK | {int(socket.AF_INET), int(socket.AF_INET6)}

_ARGUED: Final = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "ioctl": (16, 29)}

_MACHINES: Final = ("x86_64", "aarch64")
_THIS: Final = os.uname().machine
_ARCH: Final = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, _AARCH64
_SECCOMP: Final = (317, 277)
_X32: Final = 0x40000000  # x86_64's second set of numbers, which nothing of ours uses
_SET_MODE_FILTER: Final = 1
# TSYNC: for every thread that there is. SPEC_ALLOW: kernels before 5.16 would otherwise slow the process down, for
# programs that run others' code in a cage of their own making.
_FLAGS: Final = 1 | 4

_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|..|K, BPF_RET|K
_NR, _ARCH_AT, _ARG0, _ARG1 = 0, 4, 16, 24  # in struct seccomp_data; the lower halves of the arguments
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

# Of clone(2): NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES: Final = 0x7E020000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # typing into a terminal, as if its owner had


class Instruction(NamedTuple):
    """struct sock_filter."""

    code: int
    k: int
    true: int = 0
    false: int = 0


def _refused(number: int) -> Instruction:
    return Instruction(_RET, _ERRNO | number)


_ALLOWED: Final = Instruction(_RET, _ALLOW)
_EPERM: Final = _refused(errno.EPERM)


def why_not() -> str:
    """Why there can be no filter here; empty if there can."""
    return "" if _THIS in _MACHINES else f"not known on {_THIS}"


def install(names: Iterable[str], families: Collection[int]) -> None:
    """Refuses these calls (EPERM), new namespaces, typing into terminals, sockets of other `families`, and what is
    called by other numbers than this machine's own. For all threads and what is started from now on; nothing undoes
    it. Needs NO_NEW_PRIVS. OSError."""
    column = _MACHINES.index(_THIS)
    filter_ = b"".join(struct.pack("=HBBI", one.code, one.true, one.false, one.k) for one in program(names, families))
    code = ctypes.create_string_buffer(filter_, len(filter_))
    told = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(code))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(ctypes.c_long(_SECCOMP[column]), _SET_MODE_FILTER, ctypes.c_ulong(_FLAGS), told)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if found > 0:
        raise OSError(errno.EBUSY, f"thread {found} has a filter of its own")


def program(names: Iterable[str], families: Collection[int], machine: str = "") -> list[Instruction]:
    """The filter, for tests to look at."""
    column = _MACHINES.index(machine or _THIS)
    leaves = {NAMED[name][column]: [_EPERM] for name in names if NAMED[name][column]}
    leaves |= {_ARGUED[name][column]: rule for name, rule in _rules(families).items()}
    begun = [Instruction(_LOAD, _ARCH_AT), Instruction(_JEQ, _ARCH[column], 1, 0), _EPERM, Instruction(_LOAD, _NR)]
    if _MACHINES[column] == "x86_64":
        begun += [Instruction(_JGE, _X32, 0, 1), _EPERM]
    return begun + _tree(sorted(leaves.items()))


def _rules(families: Collection[int]) -> dict[str, list[Instruction]]:
    """What depends on an argument."""
    known = [Instruction(_JEQ, int(family), len(families) - at, 0) for at, family in enumerate(sorted(families))]
    return {
        "clone": [Instruction(_LOAD, _ARG0), Instruction(_JSET, _NEW_NAMESPACES, 0, 1), _EPERM, _ALLOWED],
        "clone3": [_refused(errno.ENOSYS)],  # its flags cannot be seen: whoever calls it falls back to clone
        "socket": [Instruction(_LOAD, _ARG0), *known, _refused(errno.EAFNOSUPPORT), _ALLOWED],
        "ioctl": [
            Instruction(_LOAD, _ARG1),
            Instruction(_JEQ, _TIOCSTI, 1, 0),
            Instruction(_JEQ, _TIOCLINUX, 0, 1),
            _EPERM,
            _ALLOWED,
        ],
    }


def _tree(leaves: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """The halves below `>=` the middle number; every jump fits into its byte."""
    if len(leaves) == 1:
        number, rule = leaves[0]
        return [Instruction(_JEQ, number, 1, 0), _ALLOWED, *rule]
    middle = len(leaves) // 2
    below, above = _tree(leaves[:middle]), _tree(leaves[middle:])
    return [Instruction(_JGE, leaves[middle][0], len(below), 0), *below, *above]
