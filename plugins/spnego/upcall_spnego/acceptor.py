"""Accepts blobs as a file server does, by MIT's acceptor with a keytab, for tests."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_void_p
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall_spnego.gssapi import Buffer, check, library, session_key, store_of

ACCEPT: Final = 2  # GSS_C_ACCEPT

_VOIDS: tuple[Any, ...] = (c_void_p,) * 3
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "gss_accept_sec_context": (
        *(POINTER(c_void_p), c_void_p, POINTER(Buffer), c_void_p, POINTER(c_void_p), c_void_p),
        *(POINTER(Buffer), POINTER(c_uint32), *_VOIDS[:2]),
    ),
    "gss_display_name": (c_void_p, POINTER(Buffer), c_void_p),
}


class Accepted(NamedTuple):
    """An accepted session: client, session key, and flags of the client (RFC 2744)."""

    client: str
    key: bytes
    flags: int


def accept(blob: bytes, keytab: Path) -> Accepted:
    """Accepts a blob. GssError if a server would refuse it. Leaves a replay cache file, unless KRB5RCACHENAME is
    "none:" in the environment."""
    gss = library()
    for called, takes in _SIGNATURES.items():
        function = getattr(gss, called)
        function.argtypes, function.restype = [POINTER(c_uint32), *takes], c_uint32
    minor, flags, credential, context, client = c_uint32(), c_uint32(), c_void_p(), c_void_p(), c_void_p()
    back, store = Buffer(), store_of(keytab=f"FILE:{keytab}")
    told = Buffer(len(blob), ctypes.cast(c_char_p(blob), c_void_p))
    try:
        got = (byref(credential), None, None)
        check(gss, gss.gss_acquire_cred_from(byref(minor), None, 0, None, c_int(ACCEPT), byref(store), *got), minor)
        status = gss.gss_accept_sec_context(
            *(byref(minor), byref(context), credential, byref(told), None, byref(client), None),
            *(byref(back), byref(flags), None, None),
        )
        check(gss, status, minor)
        return Accepted(_shown(gss, client), session_key(gss, context), flags.value)
    finally:
        gss.gss_release_buffer(byref(minor), byref(back))
        gss.gss_release_name(byref(minor), byref(client))
        gss.gss_delete_sec_context(byref(minor), byref(context), None)
        gss.gss_release_cred(byref(minor), byref(credential))


def _shown(gss: ctypes.CDLL, name: c_void_p) -> str:
    minor, text = c_uint32(), Buffer()
    check(gss, gss.gss_display_name(byref(minor), name, byref(text), None), minor)
    try:
        return ctypes.string_at(text.value, text.length).decode()
    finally:
        gss.gss_release_buffer(byref(minor), byref(text))
