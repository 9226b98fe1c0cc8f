"""Packs and parses the messages between `upcall mount` and the source that mounts. Pure; docs/protocol.md.

A request is one datagram with one or two descriptors, and is answered by one datagram. A request contains nothing that
is passed to the kernel as text but the name, whose characters are few.
"""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

from upcall.core.errors import PeerError

MOUNT, UNMOUNT = 1, 2
KEY_BYTES: Final = (16, 24, 32)
MAX_SIGNATURES: Final = 4
MAX_NAME: Final = 64
MAX_REQUEST: Final = 128  # bytes
MAX_REPLY: Final = 2048  # bytes
DESCRIPTORS: Final = {MOUNT: 2, UNMOUNT: 1}
SOURCE: Final = "upcall"  # the first part of the source of a mount, as mountinfo and df(1) show it

_VERSION: Final = 1
_LAZY, _FILE_NAMES = 1, 2
_HEAD: Final = struct.Struct(
    "<BBBBBB"
)  # version, kind, flags, bytes of new files' keys, signatures, length of the name
_REPLY: Final = struct.Struct("<BB")  # version, exit status; the text follows
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}", re.ASCII)
_MADE: Final = re.compile(r"upcall:(\d{1,10}):(.+)", re.ASCII)


class MountRequest(NamedTuple):
    """What a user asks for. `signatures`: of the keys for which new files' keys are wrapped. `names_signature`: of the
    passphrase that encrypts file names; "" for none. `lazy`: unmount although it is in use."""

    kind: int
    name: str
    signatures: tuple[str, ...] = ()
    key_bytes: int = 16
    names_signature: str = ""
    lazy: bool = False


class MountReply(NamedTuple):
    """`status`: 0, or an exit status of sysexits.h with a reason and a remedy in `text`."""

    status: int
    text: str = ""


class Made(NamedTuple):
    """What the source of a mount says: for which uid it was made, and its name."""

    uid: int
    name: str

    def __str__(self) -> str:
        return f"{SOURCE}:{self.uid}:{self.name}"


def is_name(name: str) -> bool:
    """Returns whether this can be the name of a mount."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".toml")


def take_made(source: str) -> Made | None:
    """Returns what the source of an eCryptfs mount says; None if it was not made by upcall."""
    found = _MADE.fullmatch(source)
    return Made(int(found[1]), found[2]) if found and is_name(found[2]) and int(found[1]) <= 0xFFFFFFFF else None


def pack_request(request: MountRequest) -> bytes:
    """PeerError if it would be refused."""
    flags = (_LAZY if request.lazy else 0) | (_FILE_NAMES if request.names_signature else 0)
    signatures = [*request.signatures, *([request.names_signature] if request.names_signature else [])]
    try:
        name, keys = request.name.encode("ascii"), b"".join(map(bytes.fromhex, signatures))
        head = _HEAD.pack(
            _VERSION, request.kind, flags, request.key_bytes, len(request.signatures), len(name)
        )  # fmt: skip
    except (ValueError, struct.error) as error:
        raise PeerError("request", str(error)) from None
    data = head + name + keys
    if take_request(data) != request:
        raise PeerError("request", "a signature is not 16 hexadecimal digits in lower case")
    return data


def take_request(data: bytes) -> MountRequest:
    """PeerError."""
    if not _HEAD.size <= len(data) <= MAX_REQUEST:
        raise PeerError("request", f"{len(data)} bytes")
    version, kind, flags, key_bytes, count, length = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise PeerError("version", f"{version}, this is {_VERSION}", 0)
    if kind not in DESCRIPTORS:
        raise PeerError("kind", f"{kind} is unknown", 1)
    if flags & ~(_LAZY | _FILE_NAMES):
        raise PeerError("flags", f"{flags} are unknown", 2)
    names = bool(flags & _FILE_NAMES)
    if len(data) != _HEAD.size + length + 8 * (count + names):
        raise PeerError("request", f"{len(data)} bytes, which do not fit the lengths in it")
    at = _HEAD.size + length
    try:
        name = data[_HEAD.size : at].decode("ascii")
    except UnicodeDecodeError:
        raise PeerError("name", "is not ASCII", _HEAD.size) from None
    if not is_name(name):
        raise PeerError("name", "has other characters than letters, digits and ._@+-, or more than 64", _HEAD.size)
    signatures = tuple(data[start : start + 8].hex() for start in range(at, len(data), 8))
    if kind == MOUNT and (key_bytes not in KEY_BYTES or not 1 <= count <= MAX_SIGNATURES or flags & _LAZY):
        raise PeerError("request", "has other options than a mount can have")
    if kind == UNMOUNT and (key_bytes or signatures):
        raise PeerError("request", "has other options than unmounting can have")
    names_signature = signatures[-1] if names else ""
    return MountRequest(kind, name, signatures[:count], key_bytes, names_signature, bool(flags & _LAZY))


def pack_reply(reply: MountReply) -> bytes:
    text = reply.text.encode("utf-8", "backslashreplace")[: MAX_REPLY - _REPLY.size]
    return _REPLY.pack(_VERSION, reply.status) + text.decode("utf-8", "ignore").encode()


def take_reply(data: bytes) -> MountReply:
    """PeerError. The text is printable."""
    if not _REPLY.size <= len(data) <= MAX_REPLY:
        raise PeerError("reply", f"{len(data)} bytes")
    version, status = _REPLY.unpack_from(data)
    if version != _VERSION:
        raise PeerError("version", f"{version}, this is {_VERSION}", 0)
    text = data[_REPLY.size :].decode("utf-8", "replace")
    return MountReply(status, "".join(c if c.isprintable() else "?" for c in text))
