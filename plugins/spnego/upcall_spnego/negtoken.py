"""Packs and parses the first token for a CIFS server: SPNEGO's NegTokenInit with one mechanism and its token, in DER.

    [APPLICATION 0] { OID spnego, [0] { SEQUENCE { [0] mechTypes SEQUENCE OF OID, [2] mechToken OCTET STRING } } }

Source: RFC 2743, 3.1; RFC 4178, 4.2.1; X.690. Pure.
"""

from __future__ import annotations

import functools
from typing import Final

from upcall.core.errors import PeerError

SPNEGO: Final = "1.3.6.1.5.5.2"
KRB5: Final = "1.2.840.113554.1.2.2"
MS_KRB5: Final = "1.2.840.48018.1.2.2"  # the wrong identifier of Windows 2000, which servers still accept

_APPLICATION_0, _CONTEXT_0, _CONTEXT_2 = 0x60, 0xA0, 0xA2
_SEQUENCE, _OID, _OCTETS = 0x30, 0x06, 0x04
_WHAT = "NegTokenInit"
_MAX_OID: Final = 64  # bytes; those of mechanisms have about ten


def pack_negtokeninit(mechanism: str, token: bytes) -> bytes:
    """Packs a NegTokenInit. `mechanism`: a dotted object identifier. `token`: of that mechanism."""
    types = _pack(_CONTEXT_0, _pack(_SEQUENCE, pack_oid(mechanism)))
    inner = _pack(_SEQUENCE, types + _pack(_CONTEXT_2, _pack(_OCTETS, token)))
    return _pack(_APPLICATION_0, pack_oid(SPNEGO) + _pack(_CONTEXT_0, inner))


def take_negtokeninit(blob: bytes) -> tuple[tuple[str, ...], bytes]:
    """Parses a NegTokenInit that fills `blob`. Returns (mechanisms, token). PeerError if it is malformed, or has
    reqFlags or a MIC."""
    spnego, rest = _take(_whole(blob, _APPLICATION_0), _OID)
    if (oid := take_oid(spnego)) != SPNEGO:
        raise PeerError(_WHAT, f"for {oid}, not for SPNEGO")
    types, rest = _take(_whole(_whole(rest, _CONTEXT_0), _SEQUENCE), _CONTEXT_0)
    mechanisms, left = [], _whole(types, _SEQUENCE)
    while left:
        mechanism, left = _take(left, _OID)
        mechanisms.append(take_oid(mechanism))
    return tuple(mechanisms), _whole(_whole(rest, _CONTEXT_2), _OCTETS)


@functools.cache
def pack_oid(dotted: str) -> bytes:
    """Packs an OBJECT IDENTIFIER, with tag and length."""
    first, second, *arcs = map(int, dotted.split("."))
    return _pack(_OID, b"".join(map(_pack_arc, (40 * first + second, *arcs))))


def take_oid(content: bytes) -> str:
    """Parses an OBJECT IDENTIFIER from its content, without tag and length. Returns it dotted. PeerError."""
    if len(content) > _MAX_OID:
        raise PeerError(_WHAT, f"an object identifier of {len(content)} bytes, at most {_MAX_OID} are known")
    arcs, value, begins = list[int](), 0, True
    for byte in content:
        if begins and byte == 0x80:
            raise PeerError(_WHAT, "an arc of an object identifier that is not in DER's shortest form")
        begins = not byte & 0x80
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(value)
            value = 0
    if not arcs or content[-1] & 0x80:
        raise PeerError(_WHAT, f"an object identifier of {len(content)} bytes that does not end")
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def _pack_arc(value: int) -> bytes:
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))


def _pack(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def _take(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """Returns (content, rest) of the first element, which must have this tag. PeerError."""
    if len(data) < 2 or data[0] != tag:
        raise PeerError(_WHAT, f"no element with the tag {tag:#04x}, {len(data)} bytes before the end")
    size, start = data[1], 2
    if size & 0x80:
        start = 2 + (size & 0x7F)
        size = int.from_bytes(data[2:start], "big")
        if start > min(len(data), 6) or size < 0x80 or not data[2]:  # DER: the shortest form, and no other
            raise PeerError(_WHAT, f"a length that is not DER's, {len(data)} bytes before the end")
    if start + size > len(data):
        raise PeerError(_WHAT, f"{size} bytes, {len(data) - start} are there")
    return data[start : start + size], data[start + size :]


def _whole(data: bytes, tag: int) -> bytes:
    content, rest = _take(data, tag)
    if rest:
        raise PeerError(_WHAT, f"{len(rest)} bytes too many after the element {tag:#04x}")
    return content
