"""Writes archives in the "newc" cpio format of the kernel's initramfs.

Supports folders, files and symbolic links, all owned by root. The kernel accepts several archives in a row if each
begins at a multiple of four bytes; archives made here are padded accordingly.
Source: Documentation/driver-api/early-userspace, init/initramfs.c."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


@dataclass(frozen=True)
class ArchiveEntry:
    """One member. `name`: relative. `mode`: with type bits. `data`: a file's content or a link's target."""

    name: str
    mode: int
    data: bytes = b""


def folder(name: str, permissions: int = 0o755) -> ArchiveEntry:
    return ArchiveEntry(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> ArchiveEntry:
    return ArchiveEntry(name, stat.S_IFREG | permissions, data)


def link(name: str, target: str) -> ArchiveEntry:
    return ArchiveEntry(name, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[ArchiveEntry]) -> bytes:
    """Returns the archive's bytes. Adds the parent folders of each entry before it: the kernel does not create
    them."""
    made: set[str] = set()
    members: list[bytes] = []
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.name).parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                members.append(_member(len(members) + 1, folder(str(parent))))
        if not (stat.S_ISDIR(entry.mode) and entry.name in made):
            made.add(entry.name)
            members.append(_member(len(members) + 1, entry))
    members.append(_member(0, ArchiveEntry(TRAILER, 0)))
    return b"".join(members)


def _member(inode: int, entry: ArchiveEntry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = MAGIC + b"".join(b"%08x" % number for number in numbers)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)
