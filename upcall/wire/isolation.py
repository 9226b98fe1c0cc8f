"""Packs and parses the messages between a daemon and an isolated key module: one datagram each, native byte order.

    version u8, kind u8, code u16, id u32, handle u32, text_len u32, text (UTF-8), data

    kind         from    text           data             code
    OPEN         daemon  signature      blob             `handle`: number of the key from now on
    WRAP, UNWRAP daemon                 input
    STALE, EXPORT, CLOSE daemon
    PASSPHRASE   child   source
    PIN, TOUCH   child   token          prompt (UTF-8)
    VERDICT      child   token                           1 if the PIN was good
    ANSWER       both                   result           of OPEN: optional members of the handle; of STALE: 1 if it is
    REFUSED      both    reason         why (UTF-8)      errno
    FAILED       both    why, for people                 EXHAUSTED if the child should be replaced
    BROKE        both    exception and place, for logs   EXHAUSTED if the child should be replaced

The daemon numbers its requests with `id`. A question of the child carries the id of the request that needs it, one
question at a time. An outcome carries the id of its request or question.

The daemon and `upcall prompt` use some of these messages, too: see upcall.daemon.prompting.agent.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from upcall.core.errors import PeerError, Refused

VERSION: Final = 1
MAX_TEXT: Final = 8192  # bytes: a path of 4096, and words around it
MAX_DATA: Final = 65536

OPEN, WRAP, UNWRAP, STALE, EXPORT, CLOSE = range(1, 7)
ANSWER, REFUSED, FAILED, BROKE = range(16, 20)
PASSPHRASE, PIN, VERDICT, TOUCH = range(32, 36)

REQUESTS: Final = frozenset({OPEN, WRAP, UNWRAP, STALE, EXPORT, CLOSE})
OUTCOMES: Final = frozenset({ANSWER, REFUSED, FAILED, BROKE})
QUESTIONS: Final = frozenset({PASSPHRASE, PIN, VERDICT, TOUCH})

WATCHED, CLOSABLE, PUBLIC = 1, 2, 4  # optional members of a handle: a bit mask
EXHAUSTED: Final = 1  # no descriptors or no memory left: the module leaks

HEAD: Final = struct.Struct("=BBHIII")
MAX_MESSAGE: Final = HEAD.size + MAX_TEXT + MAX_DATA

_WITH_HANDLE = REQUESTS
_WITH_CODE = frozenset({*OUTCOMES, VERDICT})
_WITH_TEXT = frozenset({OPEN, REFUSED, FAILED, BROKE, *QUESTIONS})
_WITH_DATA = frozenset({OPEN, WRAP, UNWRAP, ANSWER, REFUSED, PIN, TOUCH})


class ChildMessage(NamedTuple):
    """One message. `data` may be a secret: `take` copies it into a buffer of its own, which the caller must wipe."""

    kind: int
    id: int
    handle: int = 0
    code: int = 0
    text: str = ""
    data: bytes | bytearray = b""

    def __repr__(self) -> str:
        return (
            f"Message(kind={self.kind}, id={self.id}, handle={self.handle}, code={self.code}, "
            f"text=<{len(self.text)} characters>, data=<{len(self.data)} bytes>)"
        )


def refused_message(number: int, refused: Refused) -> ChildMessage:
    """Returns the REFUSED for a request or question."""
    why = fitting(refused.why).encode("utf-8")
    return ChildMessage(REFUSED, number, code=refused.errno & 0xFFFF, text=fitting(refused.reason), data=why)


def refused_of(message: ChildMessage) -> Refused:
    """Returns the exception that a REFUSED stands for."""
    return Refused(message.text, message.code, str(message.data[:MAX_TEXT], "utf-8", "replace"))


def pack(message: ChildMessage) -> bytearray:
    """Returns the bytes of one message; the caller must wipe them. PeerError if a field is too long or out of
    bounds."""
    kind, number, handle, code, words, data = message
    try:
        text = words.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise PeerError("message", "its text cannot be written in UTF-8") from None
    _check(kind, handle, code, len(text), len(data))
    if not 0 <= number <= 0xFFFFFFFF or not 0 <= handle <= 0xFFFFFFFF or not 0 <= code <= 0xFFFF:
        raise PeerError("message", f"id {number}, handle {handle} or code {code} is out of bounds")
    buffer = bytearray(HEAD.size + len(text) + len(data))
    HEAD.pack_into(buffer, 0, VERSION, kind, code, number, handle, len(text))
    buffer[HEAD.size : HEAD.size + len(text)] = text
    buffer[HEAD.size + len(text) :] = data
    return buffer


def take(data: bytes | bytearray | memoryview) -> ChildMessage:
    """Parses one message that fills `data`. PeerError if it is malformed. The caller must wipe `data` of the
    result."""
    if len(data) < HEAD.size:
        raise PeerError("message", f"{len(data)} bytes, at least {HEAD.size} are needed")
    version, kind, code, number, handle, size = HEAD.unpack_from(data)
    if version != VERSION:
        raise PeerError("message", f"version {version}, {VERSION} is known", 0)
    if size > len(data) - HEAD.size:
        raise PeerError("message", f"text_len {size}, {len(data) - HEAD.size} bytes are left", 12)
    at = HEAD.size + size
    _check(kind, handle, code, size, len(data) - at)
    text = str(data[HEAD.size : at], "utf-8", "surrogateescape") if size else ""
    return ChildMessage(kind, number, handle, code, text, bytearray(data[at:]))


def _check(kind: int, handle: int, code: int, text: int, data: int) -> None:
    """Rejects fields that a message of this kind does not have, and those that are too long. PeerError."""
    if kind not in REQUESTS and kind not in OUTCOMES and kind not in QUESTIONS:
        raise PeerError("message", f"kind {kind} is unknown", 1)
    if (code and kind not in _WITH_CODE) or (handle and kind not in _WITH_HANDLE):
        raise PeerError("message", f"kind {kind} has no place for code {code}, handle {handle}", 2)
    if text > (MAX_TEXT if kind in _WITH_TEXT else 0):
        raise PeerError("message", f"kind {kind} has no place for a text of {text} bytes", 12)
    if data > (MAX_DATA if kind in _WITH_DATA else 0):
        raise PeerError("message", f"kind {kind} has no place for {data} bytes", HEAD.size)


def fitting(text: str) -> str:
    """Returns an error text cut to MAX_TEXT bytes of UTF-8."""
    return text.encode("utf-8", "backslashreplace")[:MAX_TEXT].decode("utf-8", "ignore")
