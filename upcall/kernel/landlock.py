"""Restricts this thread, and what it starts, to writing below given paths, by Landlock.

Applies the rights that the kernel's version knows; the version is noted beside each right. Reading is not restricted,
and open files stay open. A restricted process can no longer trace or read the memory of unrestricted ones, nor mount.
Source: landlock(7), include/uapi/linux/landlock.h. Its system call numbers are the same on all architectures supported
here.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from upcall.kernel import libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE = 1 << 0, 1 << 1
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER = 1 << 13  # to rename and link from one folder to another; since ABI 2
_TRUNCATE = 1 << 14  # since ABI 3; before, a readable file may be truncated
_BIND_TCP, _CONNECT_TCP = 1, 2  # since ABI 4
_SCOPE_ABSTRACT, _SCOPE_SIGNAL = 1, 2  # since ABI 6

# Creating devices is not allowed anywhere.
WRITE: Final = (
    WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_SYM
    | _REFER | _TRUNCATE
)  # fmt: skip
_ALL_WRITING: Final = WRITE | _MAKE_CHAR | _MAKE_BLOCK
_ON_FILES: Final = EXECUTE | WRITE_FILE | _TRUNCATE  # other rights apply to folders only


class Place(NamedTuple):
    """The rights granted at `path` and, if it is a folder, beneath it."""

    path: Path
    rights: int = WRITE


def abi() -> int:
    """Returns the kernel's version of Landlock; 0 if it has none (see `why_not`)."""
    try:
        return _version()
    except OSError:
        return 0


def why_not() -> str:
    """Returns why the kernel has no Landlock; empty if it has."""
    known = {errno.ENOSYS: "this kernel has none", errno.EOPNOTSUPP: "turned off when the machine was booted (lsm=)"}
    try:
        _version()
    except OSError as error:
        return known.get(error.errno or 0, error.strerror or "")
    return ""


def _version() -> int:
    return libc.syscall(_CREATE_RULESET, None, 0, _VERSION)


def restrict(
    places: Iterable[Place],
    programs: bool = False,
    bind: bool = False,
    connect: bool = True,
    signals: bool = False,
    abstract: bool = True,
) -> int:
    """Restricts this thread for good; returns the ABI version used. Paths that cannot be opened are skipped.

    `programs`: only programs below a place with EXECUTE may be run. The rest applies if the kernel supports it.
    `bind`, `connect`: whether these calls stay allowed for TCP. `signals`, `abstract`: whether signals to processes
    outside of the restriction, and connections to their abstract sockets, stay allowed. Requires NO_NEW_PRIVS.
    OSError.
    """
    version = abi()
    known = _ALL_WRITING | (EXECUTE if programs else 0)
    known &= ~((_REFER if version < 2 else 0) | (_TRUNCATE if version < 3 else 0))
    tcp = (0 if bind else _BIND_TCP) | (0 if connect else _CONNECT_TCP) if version >= 4 else 0
    scoped = (0 if signals else _SCOPE_SIGNAL) | (0 if abstract else _SCOPE_ABSTRACT) if version >= 6 else 0
    attributes = struct.pack("=QQQ", known, tcp, scoped)  # struct landlock_ruleset_attr; 0 suits all versions
    rules = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for place in places:
            _allow(rules, place, known)
        libc.syscall(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return version


def _allow(rules: int, place: Place, known: int) -> None:
    try:
        fd = os.open(place.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # missing, or not accessible
        return
    try:
        rights = place.rights & known
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _ON_FILES
        if rights:
            rule = struct.pack("=Qi", rights, fd)  # struct landlock_path_beneath_attr, packed
            libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
