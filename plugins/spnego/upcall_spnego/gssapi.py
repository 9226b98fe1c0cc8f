"""Calls MIT's libgssapi_krb5 by ctypes: the initiator's first step of a Kerberos session with a server.

Thread-safe: each call uses a security context of its own. Releases the interpreter while it waits for a KDC.
Source: RFC 2744; gssapi/gssapi_ext.h and gssapi_krb5.h of MIT Kerberos 1.20.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p
from typing import Any, Final, NamedTuple

from upcall.core.errors import Refused, UpcallError

NAME: Final = "libgssapi_krb5.so.2"
INITIATE: Final = 1  # GSS_C_INITIATE
_MECHANISM_STATUS = 2  # GSS_C_MECH_CODE


class Oid(ctypes.Structure):
    _fields_ = [("length", c_uint32), ("elements", c_char_p)]


class OidSet(ctypes.Structure):
    _fields_ = [("count", c_size_t), ("elements", POINTER(Oid))]


class Buffer(ctypes.Structure):
    _fields_ = [("length", c_size_t), ("value", c_void_p)]


class BufferSet(ctypes.Structure):
    _fields_ = [("count", c_size_t), ("elements", POINTER(Buffer))]


class _Setting(ctypes.Structure):
    """gss_key_value_element_desc"""

    _fields_ = [("key", c_char_p), ("value", c_char_p)]


class Store(ctypes.Structure):
    """gss_key_value_set_desc"""

    _fields_ = [("count", c_uint32), ("elements", POINTER(_Setting))]


def _oid(content: str) -> Oid:
    data = bytes.fromhex(content)
    return Oid(len(data), data)


_KRB5 = _oid("2a864886f712010202")  # 1.2.840.113554.1.2.2
_PRINCIPAL_NAME = _oid("2a864886f71201020201")  # GSS_KRB5_NT_PRINCIPAL_NAME, 1.2.840.113554.1.2.2.1
SESSION_KEY = _oid("2a864886f7120102020505")  # GSS_C_INQ_SSPISESSION_KEY, 1.2.840.113554.1.2.2.5.5
_MECHANISMS = OidSet(1, ctypes.pointer(_KRB5))

_MINOR, _OID = POINTER(c_uint32), POINTER(Oid)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "gss_import_name": (POINTER(Buffer), _OID, POINTER(c_void_p)),
    "gss_release_name": (POINTER(c_void_p),),
    "gss_acquire_cred_from": (
        *(c_void_p, c_uint32, POINTER(OidSet), c_int, POINTER(Store), POINTER(c_void_p)),
        *(c_void_p, c_void_p),
    ),
    "gss_release_cred": (POINTER(c_void_p),),
    "gss_init_sec_context": (
        *(c_void_p, POINTER(c_void_p), c_void_p, _OID, c_uint32, c_uint32),
        *(c_void_p, c_void_p, c_void_p, POINTER(Buffer), c_void_p, c_void_p),
    ),
    "gss_inquire_sec_context_by_oid": (c_void_p, _OID, POINTER(POINTER(BufferSet))),
    "gss_delete_sec_context": (POINTER(c_void_p), c_void_p),
    "gss_release_buffer": (POINTER(Buffer),),
    "gss_release_buffer_set": (POINTER(POINTER(BufferSet)),),
    "gss_display_status": (c_uint32, c_int, _OID, POINTER(c_uint32), POINTER(Buffer)),
}


_WAITING: Final = ("gss_acquire_cred_from", "gss_init_sec_context")  # may block on files and KDCs


class GssError(UpcallError):
    """An error of the library. `code`: of Kerberos's error tables; 0: none. The text is the library's."""

    def __init__(self, major: int, code: int, text: str) -> None:
        self.major, self.code = major, code
        super().__init__(text)


class Session(NamedTuple):
    """The session key, and the AP-REQ that transports it to the server."""

    key: bytes
    token: bytes

    def __repr__(self) -> str:
        return f"Session(key=<{len(self.key)} bytes>, token=<{len(self.token)} bytes>)"


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the loaded library. Refused("no-library") if it is not installed."""
    try:
        loaded = ctypes.CDLL(NAME)
    except OSError as error:
        raise Refused("no-library", why=str(error)) from None
    quick = ctypes.PyDLL(NAME)  # keeps the GIL: for short calls, reacquiring it costs more
    for name, takes in _SIGNATURES.items():
        function = getattr(loaded if name in _WAITING else quick, name)
        function.argtypes, function.restype = [_MINOR, *takes], c_uint32
        setattr(loaded, name, function)
    return loaded


def initiate(server: str, cache: str, principal: str = "", keytab: str = "") -> Session:
    """Begins a session with `server` (cifs/HOST@REALM), with the tickets in `cache`. May block to request missing
    tickets from KDCs.

    With `keytab`, obtains tickets into the cache with the keys of `principal` as needed. GssError. Without mutual
    authentication, because the kernel uses the initiator's subkey, and the server would choose another one. The
    library's copy of the key is wiped; Python's cannot be.
    """
    gss = library()
    minor, name, whose = c_uint32(), c_void_p(), c_void_p()
    credential, context, token = c_void_p(), c_void_p(), Buffer()
    try:
        name = _import(gss, server)
        if principal:
            whose = _import(gss, principal)
        store = store_of(ccache=cache, client_keytab=keytab)
        check(
            gss,
            gss.gss_acquire_cred_from(
                byref(minor), whose, 0, byref(_MECHANISMS), INITIATE, byref(store), byref(credential), None, None
            ),
            minor,
        )
        status = gss.gss_init_sec_context(
            *(byref(minor), credential, byref(context), name, byref(_KRB5), 0, 0),
            *(None, None, None, byref(token), None, None),
        )
        check(gss, status, minor)
        return Session(session_key(gss, context), ctypes.string_at(token.value, token.length))
    finally:
        _release(gss, name, whose, credential, context, token)


def _import(gss: ctypes.CDLL, text: str) -> c_void_p:
    data, minor, name = text.encode(), c_uint32(), c_void_p()
    buffer = Buffer(len(data), ctypes.cast(c_char_p(data), c_void_p))
    check(gss, gss.gss_import_name(byref(minor), byref(buffer), byref(_PRINCIPAL_NAME), byref(name)), minor)
    return name


def store_of(**settings: str) -> Store:
    """Returns a credential store for gss_acquire_cred_from, from the settings that are not empty."""
    told = [(key.encode(), value.encode(errors="surrogateescape")) for key, value in settings.items() if value]
    elements = (_Setting * len(told))(*(_Setting(*one) for one in told))
    return Store(len(told), elements)


def session_key(gss: ctypes.CDLL, context: c_void_p) -> bytes:
    """Returns the session key of an established context. Wipes the library's copy."""
    minor, keys = c_uint32(), POINTER(BufferSet)()
    check(gss, gss.gss_inquire_sec_context_by_oid(byref(minor), context, byref(SESSION_KEY), byref(keys)), minor)
    try:
        if not keys or keys[0].count < 1:
            raise GssError(0, 0, "the library gave no session key")
        first = keys[0].elements[0]
        return ctypes.string_at(first.value, first.length)
    finally:
        for at in range(keys[0].count if keys else 0):
            ctypes.memset(keys[0].elements[at].value, 0, keys[0].elements[at].length)
        gss.gss_release_buffer_set(byref(minor), byref(keys))


def _release(
    gss: ctypes.CDLL, name: c_void_p, whose: c_void_p, credential: c_void_p, context: c_void_p, token: Buffer
) -> None:
    minor = c_uint32()
    if token.value is not None:
        gss.gss_release_buffer(byref(minor), byref(token))
    if context.value is not None:
        gss.gss_delete_sec_context(byref(minor), byref(context), None)
    if credential.value is not None:
        gss.gss_release_cred(byref(minor), byref(credential))
    for one in (name, whose):
        if one.value is not None:
            gss.gss_release_name(byref(minor), byref(one))


def check(gss: ctypes.CDLL, major: int, minor: c_uint32) -> None:
    """GssError unless the status is GSS_S_COMPLETE. Without mutual authentication there is no second step."""
    if major != 0:
        code = c_int32(minor.value).value
        raise GssError(major, code, _words(gss, minor.value) or f"GSS-API status {major:#x}")


def _words(gss: ctypes.CDLL, status: int) -> str:
    """Returns the text of a status. Must be called in the thread of the failed call, before its next one."""
    minor, more, text = c_uint32(), c_uint32(), Buffer()
    told = (status, _MECHANISM_STATUS, byref(_KRB5), byref(more), byref(text))
    if gss.gss_display_status(byref(minor), *told) != 0 or text.value is None:
        return ""
    try:
        return ctypes.string_at(text.value, text.length).decode(errors="replace")
    finally:
        gss.gss_release_buffer(byref(minor), byref(text))
