"""Restricts this process, and what it starts, to a list of system calls: a filter for seccomp(2).

The filter allows listed calls (syscalls.py), some depending on their arguments. Calls that inspect other processes,
mount, make namespaces or change the machine are not listed, nor are calls of later kernels until they have been
reviewed.

The filter is a binary tree over the numbers: seven comparisons, and from Linux 5.11 on none for calls that are always
allowed, because the kernel caches them in a bitmap. Source: seccomp(2), include/uapi/linux/{seccomp,filter,audit}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from upcall.kernel import libc
from upcall.kernel.syscalls import COMMON, LIBRARIES, LISTENING

UNIX_AND_NETLINK: Final = frozenset({int(socket.AF_UNIX), int(socket.AF_NETLINK)})
AND_INTERNET: Final = UNIX_AND_NETLINK | {int(socket.AF_INET), int(socket.AF_INET6)}
# Netlink protocols: for getaddrinfo(3); links of daemons; logins (audit); libusb; quotas.
ROUTE, USERSOCK, AUDIT, UEVENT, GENERIC = 0, 2, 9, 15, 16
OF_BROKER: Final[dict[str, int]] = {**COMMON, **LISTENING}
OF_SOURCE: Final[dict[str, int]] = dict(COMMON)
OF_DAEMON: Final[dict[str, int]] = {**COMMON, **LISTENING, **LIBRARIES}

_ARGUED: Final = {"clone": 56, "clone3": 435, "socket": 41, "ioctl": 16, "prctl": 157}
# Ranges of numbers that were reviewed: calls not allowed there fail with EPERM. Others, of later kernels, fail with
# ENOSYS, so that the C library falls back to older calls.
_DECIDED: Final = ((0, 335), (424, 451))

_MACHINE: Final = "x86_64"  # the only one that was tested
_THIS: Final = os.uname().machine
_ARCH: Final = 0xC000003E  # AUDIT_ARCH_X86_64
_SECCOMP: Final = 317
_X32: Final = 0x40000000  # x86_64's second set of numbers (x32), which upcall does not use
_SET_MODE_FILTER: Final = 1
# TSYNC: for all existing threads. SPEC_ALLOW: kernels before 5.16 would otherwise slow the process down by mitigations
# that only programs which run untrusted code in a sandbox of their own need.
_FLAGS: Final = 1 | 4

# BPF_LD|W|ABS, BPF_JMP|..|K, BPF_RET|K, BPF_ALU|AND|K, BPF_JMP|JA
_LOAD, _JEQ, _JGE, _JSET, _RET, _AND, _JUMP = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54, 0x05
_NR, _ARCH_AT, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32  # offsets in struct seccomp_data; of arguments the lower halves
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

# Of clone(2): NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES: Final = 0x7E020000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # ioctls that insert input into a terminal
_SET_DUMPABLE, _SET_MM, _SET_PTRACER = 4, 35, 0x59616D61
_TCP, _UDP = 6, 17


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
_ENOSYS: Final = _refused(errno.ENOSYS)


def why_not() -> str:
    """Returns why there can be no filter on this architecture; empty if there can."""
    return "" if _THIS == _MACHINE else f"not known on {_THIS}"


def install(calls: Mapping[str, int], families: Collection[int], netlink: Collection[int]) -> None:
    """Allows only these system calls (name -> number), for all threads and what they start, irrevocably. Other known
    calls fail with EPERM, later ones with ENOSYS.

    Also refuses new namespaces, input into terminals, sockets of other `families` or `netlink` protocols, and calls by
    other architectures' numbers. Requires NO_NEW_PRIVS. OSError.
    """
    _load(program(calls, families, netlink))


def refuse_listening() -> None:
    """Refuses listen(2) in addition, for a process that has all its listening sockets. OSError."""
    _load([Instruction(_LOAD, _NR), Instruction(_JEQ, LISTENING["listen"], 0, 1), _EPERM, _ALLOWED])


def _load(instructions: Collection[Instruction]) -> None:
    filter_ = b"".join(struct.pack("=HBBI", one.code, one.true, one.false, one.k) for one in instructions)
    code = ctypes.create_string_buffer(filter_, len(filter_))
    sock_fprog = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(code))
    found = libc.syscall(_SECCOMP, _SET_MODE_FILTER, _FLAGS, sock_fprog)
    if found > 0:
        raise OSError(errno.EBUSY, f"thread {found} has a filter of its own")


def program(calls: Mapping[str, int], families: Collection[int], netlink: Collection[int]) -> list[Instruction]:
    """Returns the filter's instructions; public for tests."""
    rules = {number: [_ALLOWED] for number in calls.values()}
    rules |= {_ARGUED[name]: rule for name, rule in _rules(families, netlink).items()}
    begun = [Instruction(_LOAD, _ARCH_AT), Instruction(_JEQ, _ARCH, 1, 0), _EPERM, Instruction(_LOAD, _NR)]
    begun += [Instruction(_JGE, _X32, 0, 1), _EPERM]
    runs: list[tuple[int, list[Instruction]]] = []
    for number in range(max(*rules, _DECIDED[-1][1]) + 2):
        known = any(first <= number < end for first, end in _DECIDED)
        rule = rules.get(number, [_EPERM if known else _ENOSYS])
        if not runs or runs[-1][1] != rule:
            runs.append((number, rule))
    return begun + _tree(runs)


def _rules(families: Collection[int], netlink: Collection[int]) -> dict[str, list[Instruction]]:
    """Returns the rules of calls that depend on an argument."""
    return {
        "clone": [Instruction(_LOAD, _ARG0), Instruction(_JSET, _NEW_NAMESPACES, 0, 1), _EPERM, _ALLOWED],
        "clone3": [_ENOSYS],  # a filter cannot read its flags; callers fall back to clone
        "socket": _sockets(families, netlink),
        "ioctl": [Instruction(_LOAD, _ARG1), *_none_of((_TIOCSTI, _TIOCLINUX)), _EPERM],
        "prctl": [
            Instruction(_LOAD, _ARG0),
            Instruction(_JEQ, _SET_DUMPABLE, 0, 4),
            Instruction(_LOAD, _ARG1),
            Instruction(_JEQ, 0, 0, 1),
            _ALLOWED,
            _EPERM,
            *_none_of((_SET_MM, _SET_PTRACER)),
            _EPERM,
        ],
    }


def _none_of(values: Collection[int]) -> list[Instruction]:
    """Allows the call unless the loaded value is one of these; then continues after this block."""
    tests = [Instruction(_JEQ, value, len(values) - at, 0) for at, value in enumerate(values)]
    return [*tests, _ALLOWED]


def _one_of(values: Collection[int], otherwise: int) -> list[Instruction]:
    """Refuses the call unless the loaded value is one of these; then continues after this block."""
    tests = [Instruction(_JEQ, value, len(values) - at, 0) for at, value in enumerate(sorted(values))]
    return [*tests, _refused(otherwise)]


def _sockets(families: Collection[int], netlink: Collection[int]) -> list[Instruction]:
    """Checks socket(2): the family; for netlink the protocol; for the internet, TCP and UDP by type and protocol.
    Excludes MPTCP, which Landlock does not treat as TCP, and sockets for raw packets that need no privilege."""
    spoken = [Instruction(_LOAD, _ARG2), *_one_of(netlink, errno.EPROTONOSUPPORT), _ALLOWED]
    internet = [
        Instruction(_LOAD, _ARG1),
        Instruction(_AND, 0xF),
        *_one_of((socket.SOCK_STREAM, socket.SOCK_DGRAM), errno.ESOCKTNOSUPPORT),
        Instruction(_LOAD, _ARG2),
        *_one_of((0, _TCP, _UDP), errno.EPROTONOSUPPORT),
        _ALLOWED,
    ]
    return [
        Instruction(_LOAD, _ARG0),
        *_one_of(families, errno.EAFNOSUPPORT),
        Instruction(_JEQ, socket.AF_NETLINK, 0, len(spoken)),
        *spoken,
        Instruction(_JEQ, socket.AF_UNIX, 0, 1),
        _ALLOWED,
        *internet,
    ]


def _tree(runs: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Returns a binary tree over the runs. A jump that does not fit into a byte uses an instruction with a word
    offset."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    below, above = _tree(runs[:middle]), _tree(runs[middle:])
    if len(below) < 256:
        return [Instruction(_JGE, runs[middle][0], len(below), 0), *below, *above]
    return [Instruction(_JGE, runs[middle][0], 0, 1), Instruction(_JUMP, len(below)), *below, *above]
