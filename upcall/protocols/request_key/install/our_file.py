"""Renders and parses /etc/request-key.d/upcall.conf. A checksum in it detects later edits."""

from __future__ import annotations

import hashlib
import re
from typing import Final, NamedTuple

from upcall.protocols.request_key.conf import lines
from upcall.protocols.request_key.key_types import KEY_TYPES

FILE: Final = "/etc/request-key.d/upcall.conf"
PACKAGED: Final = "/etc/request-key.d/upcall-{}.conf"  # of Debian's packages, {}: the plugin
COPY: Final = "/usr/local/libexec/upcall/upcall-request-key"

_FIRST: Final = b"# Made by `upcall request-key install`, which replaces it: put lines of your own into other files.\n"
_SUM = re.compile(rb"# What follows has the SHA-256 ([0-9a-f]{64})\.\n")
_COPY = re.compile(rb"# The program is a copy with the SHA-256 ([0-9a-f]{64})\.\n")


class Ours(NamedTuple):
    """The content of the file. `types`: key types. `command`: the program and its arguments before the key. `copied`:
    the SHA-256 of the program's copy, in hexadecimal; None: no copy."""

    types: tuple[str, ...]
    command: tuple[str, ...]
    copied: str | None = None


def render(ours: Ours) -> bytes:
    """Returns the bytes of the file."""
    copied = b"" if ours.copied is None else f"# The program is a copy with the SHA-256 {ours.copied}.\n".encode()
    data = copied + body(ours)
    return _FIRST + f"# What follows has the SHA-256 {hashlib.sha256(data).hexdigest()}.\n".encode("ascii") + data


def body(ours: Ours) -> bytes:
    """Returns the lines for request-key."""
    command = " ".join((*ours.command, "%k")).encode()
    found = [(name.encode("ascii"), pattern) for name in ours.types for pattern in KEY_TYPES[name].patterns]
    return b"".join(b"\t".join((b"create", name, pattern, b"*", command)) + b"\n" for name, pattern in found)


def is_upcalls(path: str) -> bool:
    """Returns whether a file has lines of upcall's: FILE, or that of a package."""
    return path == FILE or re.fullmatch(re.escape(PACKAGED).replace(r"\{\}", "[a-z0-9]+"), path) is not None


def is_ours(data: bytes) -> bool:
    """Returns whether upcall wrote this file. It may have been edited since."""
    return data.startswith(_FIRST)


def take(data: bytes) -> Ours | None:
    """Parses our file. None if it was edited since upcall wrote it."""
    found = _SUM.match(data, len(_FIRST)) if is_ours(data) else None
    if found is None or hashlib.sha256(body := data[found.end() :]).hexdigest().encode("ascii") != found[1]:
        return None
    copied = _COPY.match(body)
    read = list(lines(FILE, body))
    command = read[0].command.decode().split() if read else []
    types = tuple(dict.fromkeys(line.columns[1].decode("ascii") for line in read))
    return Ours(types, tuple(command[:-1]), copied[1].decode("ascii") if copied else None)
