"""Parses and formats PKCS #11 URIs (RFC 7512), which name keys in tokens. Strict; refuses PINs in URIs. Pure.

    pkcs11:token=lab;serial=12ab;object=files;id=%01?module-path=/usr/lib/softhsm/libsofthsm2.so

Other attributes of RFC 7512 name things that change (slots) or are configured elsewhere (names of libraries). They are
refused, not ignored: ignoring one would make the URI match more than it says. Errors quote no values, which could be
PINs.
"""

from __future__ import annotations

import string
from typing import NamedTuple

from upcall.core.errors import PeerError

WHAT = "PKCS #11 URI"
SCHEME = "pkcs11:"
MAX_URI = 1024  # characters

_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_BOTH = _UNRESERVED | frozenset(":[]@!$'()*+,=")
_IN_PATH = _BOTH | {"&"}
_IN_QUERY = _BOTH | frozenset("/?|")
_HEX = frozenset(string.hexdigits)
_FILE = "file:"

_PATH = ("token", "manufacturer", "serial", "model", "object", "id")  # in the canonical order
_ELSEWHERE = {
    "pin-value": "a PIN would stand in clear in the key store and the auth token: leave it out, it is asked for",
    "module-name": "libraries are named by module-path",
    "slot-id": "slots change: name the token",
    "slot-description": "slots change: name the token",
    "slot-manufacturer": "slots change: name the token",
    "library-manufacturer": "libraries are named by module-path",
    "library-description": "libraries are named by module-path",
    "library-version": "libraries are named by module-path",
}


class Uri(NamedTuple):
    """A parsed URI. None: the attribute is missing and matches any value. Paths are absolute."""

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    object: str | None = None
    id: bytes | None = None
    module_path: str | None = None
    pin_file: str | None = None  # pin-source=file:/path

    def __str__(self) -> str:
        """Returns the canonical form, which `parse_uri` accepts."""
        path = ";".join(f"{name}={_escape(value)}" for name in _PATH if (value := getattr(self, name)) is not None)
        query = []
        if self.module_path is not None:
            query.append("module-path=" + _escape(self.module_path, _UNRESERVED | {"/"}))
        if self.pin_file is not None:
            query.append("pin-source=file:" + _escape(self.pin_file, _UNRESERVED | {"/"}))
        return SCHEME + path + ("?" + "&".join(query) if query else "")


def parse_uri(text: str) -> Uri:
    """Parses a URI. PeerError if it is malformed; it names the character's offset. `type=private` and `type=public`
    are accepted and ignored: both halves of a key pair match."""
    if len(text) > MAX_URI:
        raise PeerError(WHAT, f"{len(text)} characters, at most {MAX_URI} are allowed")
    if text[: len(SCHEME)].lower() != SCHEME:
        raise PeerError(WHAT, "does not begin with pkcs11:", 0)
    path, _, query = text[len(SCHEME) :].partition("?")
    found: dict[str, str | bytes] = {}
    _take(path, len(SCHEME), ";", (*_PATH, "type"), _IN_PATH, found)
    _take(query, len(SCHEME) + len(path) + 1, "&", ("module-path", "pin-source"), _IN_QUERY, found)
    found.pop("type", None)
    return Uri(**{_FIELDS.get(name, name): value for name, value in found.items()})  # type: ignore[arg-type]


_FIELDS = {"module-path": "module_path", "pin-source": "pin_file"}


def _take(
    part: str, at: int, mark: str, known: tuple[str, ...], allowed: frozenset[str], found: dict[str, str | bytes]
) -> None:
    """Parses the attributes of the path or query, which begins at character `at`, into `found`. PeerError."""
    for piece in part.split(mark) if part else ():
        name, equals, value = piece.partition("=")
        if name in _ELSEWHERE:
            raise PeerError(WHAT, f"{name}: {_ELSEWHERE[name]}", at)
        if not equals or name not in known:
            raise PeerError(WHAT, f"one of {', '.join(known)} is expected", at)
        if name in found:
            raise PeerError(WHAT, f"{name} is said twice", at)
        start = at + len(name) + 1
        found[name] = _meaning(name, _unescape(value, start, allowed), start)
        at += len(piece) + 1


def _unescape(value: str, at: int, allowed: frozenset[str]) -> bytes:
    out, index = bytearray(), 0
    while index < len(value):
        char = value[index]
        if char == "%":
            digits = value[index + 1 : index + 3]
            if len(digits) != 2 or not _HEX.issuperset(digits):
                raise PeerError(WHAT, "two hexadecimal digits are expected after %", at + index)
            out.append(int(digits, 16))
            index += 3
        elif char in allowed:
            out.append(ord(char))
            index += 1
        else:
            raise PeerError(WHAT, "a character that must be written as %XX", at + index)
    return bytes(out)


def _meaning(name: str, value: bytes, at: int) -> str | bytes:
    if name == "id":
        return value
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        raise PeerError(WHAT, f"{name} is not UTF-8", at) from None
    if "\0" in text:
        raise PeerError(WHAT, f"{name} holds a NUL", at)
    if name == "type" and text not in ("private", "public"):
        raise PeerError(WHAT, "type must be private or public", at)
    if name == "pin-source":
        if not text.startswith(_FILE):
            raise PeerError(WHAT, "pin-source must be file:/path", at)
        text = text.removeprefix(_FILE)
        text = text.removeprefix("//") if text.startswith("///") else text
    if name in _FIELDS and (not text.startswith("/") or text.startswith("//")):
        raise PeerError(WHAT, f"the path in {name} is not absolute", at)
    return text


def _escape(value: str | bytes, plain: frozenset[str] = _UNRESERVED) -> str:
    if isinstance(value, bytes):
        return "".join(f"%{byte:02X}" for byte in value)  # RFC 7512: every byte of an id should be escaped
    return "".join(chr(byte) if chr(byte) in plain else f"%{byte:02X}" for byte in value.encode("utf-8"))
