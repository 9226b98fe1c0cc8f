"""Calls MIT's libkrb5 by ctypes: reads credential caches and keytabs. Contacts no KDC.

A `Context` belongs to one thread and costs 10 us. Each request makes a new one, so configuration changes take effect.
Source: krb5/krb5.h of MIT Kerberos 1.20, whose ABI has not changed since 1.10.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_uint, c_uint32, c_void_p
from typing import Any, Final, NamedTuple, Self

from upcall.core.errors import Refused, UpcallError

NAME: Final = "libkrb5.so.3"
REFERRAL: Final = ""  # realm of hosts without an entry in krb5.conf: the client's KDC refers to the right one

_NT_UNKNOWN = 0
CC_END, KT_END, FCC_NOFILE = -1765328242, -1765328202, -1765328189
_PATH = 4200  # bytes for the name of a keytab
_ESCAPED: Final = "surrogateescape"  # as Python itself does with file names


class _Data(ctypes.Structure):
    """krb5_data"""

    _fields_ = [("magic", c_int32), ("length", c_uint), ("data", c_void_p)]


class _Creds(ctypes.Structure):
    """krb5_creds. `end`, like all times of Kerberos, is an unsigned 32-bit number, valid until 2106."""

    _fields_ = [
        ("magic", c_int32),
        ("client", c_void_p),
        ("server", c_void_p),
        ("key_magic", c_int32),
        ("enctype", c_int32),
        ("key_length", c_uint),
        ("key", c_void_p),
        ("auth", c_uint32),
        ("start", c_uint32),
        ("end", c_uint32),
        ("renew_till", c_uint32),
        ("is_skey", c_uint),
        ("flags", c_int32),
        ("addresses", c_void_p),
        ("ticket", _Data),
        ("second_ticket", _Data),
        ("authdata", c_void_p),
    ]


class _KeytabEntry(ctypes.Structure):
    """krb5_keytab_entry, with room for its last members."""

    _fields_ = [("magic", c_int32), ("principal", c_void_p), ("rest", c_void_p * 8)]


# Calls that do not block keep the GIL: reacquiring it costs more.
_QUICK: Final = frozenset(
    {"krb5_free_cred_contents", "krb5_free_principal", "krb5_free_string", "krb5_free_unparsed_name"}
    | {"krb5_timeofday", "krb5_unparse_name"}
)

# Argument types after the context. All return a krb5_error_code, except those named below.
_OUT = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "krb5_cc_default": (_OUT,),
    "krb5_cc_resolve": (c_char_p, _OUT),
    "krb5_cc_close": (c_void_p,),
    "krb5_cc_initialize": (c_void_p, c_void_p),
    "krb5_cc_copy_creds": (c_void_p, c_void_p),
    "krb5_cc_destroy": (c_void_p,),
    "krb5_cc_get_full_name": (c_void_p, _OUT),
    "krb5_cc_get_principal": (c_void_p, _OUT),
    "krb5_cc_start_seq_get": (c_void_p, _OUT),
    "krb5_cc_next_cred": (c_void_p, _OUT, POINTER(_Creds)),
    "krb5_cc_end_seq_get": (c_void_p, _OUT),
    "krb5_cccol_cursor_new": (_OUT,),
    "krb5_cccol_cursor_next": (c_void_p, _OUT),
    "krb5_cccol_cursor_free": (_OUT,),
    "krb5_free_cred_contents": (POINTER(_Creds),),
    "krb5_free_principal": (c_void_p,),
    "krb5_free_string": (c_void_p,),
    "krb5_free_unparsed_name": (c_void_p,),
    "krb5_free_error_message": (c_void_p,),
    "krb5_get_error_message": (c_int32,),
    "krb5_kt_client_default": (_OUT,),
    "krb5_kt_default": (_OUT,),
    "krb5_kt_resolve": (c_char_p, _OUT),
    "krb5_kt_get_name": (c_void_p, c_char_p, c_int),
    "krb5_kt_close": (c_void_p,),
    "krb5_kt_start_seq_get": (c_void_p, _OUT),
    "krb5_kt_next_entry": (c_void_p, POINTER(_KeytabEntry), _OUT),
    "krb5_kt_end_seq_get": (c_void_p, _OUT),
    "krb5_free_keytab_entry_contents": (POINTER(_KeytabEntry),),
    "krb5_sname_to_principal": (c_char_p, c_char_p, c_int32, _OUT),
    "krb5_timeofday": (POINTER(c_int32),),
    "krb5_unparse_name": (c_void_p, _OUT),
}
_OTHER_RESULTS: dict[str, Any] = {"krb5_get_error_message": c_void_p}


class Krb5Error(UpcallError):
    """An error of libkrb5: a code of its tables, and its text."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class Ticket(NamedTuple):
    """A ticket in a cache, without its key."""

    server: str
    end: int  # seconds since 1970


class Held(NamedTuple):
    """The content of a cache."""

    principal: str
    tickets: tuple[Ticket, ...]
    now: int  # the KDC's time, by the offset stored in the cache; seconds since 1970


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the loaded library. By CDLL, which releases the GIL: a call may wait for another process's lock on a
    cache. Refused("no-library")."""
    try:
        loaded = ctypes.CDLL(NAME)
    except OSError as error:
        raise Refused("no-library", why=str(error)) from None
    loaded.krb5_init_context.argtypes, loaded.krb5_free_context.argtypes = [_OUT], [c_void_p]
    quick = ctypes.PyDLL(NAME)
    for name, takes in _SIGNATURES.items():
        function = getattr(quick if name in _QUICK else loaded, name)
        function.argtypes = [c_void_p, *takes]
        function.restype = _OTHER_RESULTS.get(name, c_int32)
        setattr(loaded, name, function)
    return loaded


class Context:
    """A krb5_context, for one thread: krb5.conf and environment. A context manager. Methods raise Krb5Error."""

    def __init__(self) -> None:
        self._krb5 = library()
        self._context = c_void_p()
        if code := self._krb5.krb5_init_context(byref(self._context)):
            raise Krb5Error(code, self._words(code))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._krb5.krb5_free_context(self._context)

    # --- caches ------------------------------------------------------------------------------------------------

    def default_cache(self) -> str:
        """Returns the default cache's name, TYPE:REST. The cache may not exist."""
        with self._got("krb5_cc_default", "krb5_cc_close") as cache:
            return self._full_name(cache)

    def collection(self) -> list[str]:
        """Returns the names of all caches of the default cache's type."""
        names: list[str] = []
        with self._got("krb5_cccol_cursor_new", "krb5_cccol_cursor_free", by_reference=True) as cursor:
            while True:
                with self._got("krb5_cccol_cursor_next", "krb5_cc_close", cursor) as cache:
                    if cache.value is None:
                        return names
                    names.append(self._full_name(cache))

    def look(self, name: str) -> Held:
        """Reads the cache of this name. Krb5Error; code FCC_NOFILE if there is none."""
        with self._got("krb5_cc_resolve", "krb5_cc_close", _bytes(name)) as cache:
            with self._got("krb5_cc_get_principal", "krb5_free_principal", cache) as principal:
                whose = self._name(principal)
            tickets, creds = [], _Creds()
            cursor = c_void_p()
            self._call("krb5_cc_start_seq_get", cache, byref(cursor))
            try:
                while not (code := self._krb5.krb5_cc_next_cred(self._context, cache, byref(cursor), byref(creds))):
                    try:
                        tickets.append(Ticket(self._name(c_void_p(creds.server)), creds.end))
                    finally:
                        self._krb5.krb5_free_cred_contents(self._context, byref(creds))  # wipes the key, too
            finally:
                self._krb5.krb5_cc_end_seq_get(self._context, cache, byref(cursor))
            if code != CC_END:
                raise self._error(code)
            return Held(whose, tuple(tickets), self._now())

    def copy(self, name: str, target: str) -> None:
        """Copies a cache to another one, whose content is replaced."""
        with (
            self._got("krb5_cc_resolve", "krb5_cc_close", _bytes(name)) as cache,
            self._got("krb5_cc_get_principal", "krb5_free_principal", cache) as principal,
            self._got("krb5_cc_resolve", "krb5_cc_close", _bytes(target)) as made,
        ):
            self._call("krb5_cc_initialize", made, principal)
            self._call("krb5_cc_copy_creds", cache, made)

    def destroy(self, name: str) -> None:
        """Destroys a cache. Does nothing if there is none."""
        cache = c_void_p()
        self._call("krb5_cc_resolve", _bytes(name), byref(cache))
        self._krb5.krb5_cc_destroy(self._context, cache)

    def _full_name(self, cache: c_void_p) -> str:
        with self._got("krb5_cc_get_full_name", "krb5_free_string", cache) as name:
            return _text(name)

    def _now(self) -> int:
        seconds = c_int32()
        self._call("krb5_timeofday", byref(seconds))
        return seconds.value & 0xFFFFFFFF

    # --- keytabs -----------------------------------------------------------------------------------------------

    def client_keytab(self) -> str:
        """Returns the name of this user's client keytab, with whose keys tickets can be obtained."""
        return self._keytab_name("krb5_kt_client_default")

    def machine_keytab(self) -> str:
        """Returns the name of the keytab of this machine's services."""
        return self._keytab_name("krb5_kt_default")

    def principals(self, keytab: str) -> list[str]:
        """Returns the principals of a keytab, in its order, without duplicates."""
        found: dict[str, None] = {}
        with self._got("krb5_kt_resolve", "krb5_kt_close", _bytes(keytab)) as opened:
            cursor, entry = c_void_p(), _KeytabEntry()
            self._call("krb5_kt_start_seq_get", opened, byref(cursor))
            try:
                while not (code := self._krb5.krb5_kt_next_entry(self._context, opened, byref(entry), byref(cursor))):
                    try:
                        found[self._name(c_void_p(entry.principal))] = None
                    finally:
                        self._krb5.krb5_free_keytab_entry_contents(self._context, byref(entry))
            finally:
                self._krb5.krb5_kt_end_seq_get(self._context, opened, byref(cursor))
            if code != KT_END:
                raise self._error(code)
        return list(found)

    def _keytab_name(self, which: str) -> str:
        with self._got(which, "krb5_kt_close") as keytab:
            buffer = ctypes.create_string_buffer(_PATH)
            self._call("krb5_kt_get_name", keytab, buffer, len(buffer))
            return buffer.value.decode(errors=_ESCAPED)

    # --- names -------------------------------------------------------------------------------------------------

    def server(self, host: str) -> str:
        """Returns cifs/HOST@REALM; the realm is from [domain_realm] of krb5.conf. Does not canonicalise the host by
        DNS: a forged answer could choose the server to which the daemon authenticates."""
        told = (_bytes(host), b"cifs", _NT_UNKNOWN)
        with self._got("krb5_sname_to_principal", "krb5_free_principal", *told) as principal:
            return self._name(principal)

    def _name(self, principal: c_void_p) -> str:
        with self._got("krb5_unparse_name", "krb5_free_unparsed_name", principal) as name:
            return _text(name)

    # --- calls -------------------------------------------------------------------------------------------------

    def _got(self, getter: str, release: str, *arguments: Any, by_reference: bool = False) -> _Got:
        """A context with the object that a function returns by its last parameter; releases it at the end."""
        got = c_void_p()
        self._call(getter, *arguments, byref(got))
        return _Got(self._context, getattr(self._krb5, release), got, by_reference)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._krb5, name)(self._context, *arguments):
            raise self._error(code)

    def _error(self, code: int) -> Krb5Error:
        return Krb5Error(code, self._words(code))

    def _words(self, code: int) -> str:
        said = c_void_p(self._krb5.krb5_get_error_message(self._context, code))
        try:
            return _text(said)
        finally:
            self._krb5.krb5_free_error_message(self._context, said)


class _Got:
    """A context manager for an object of the library. Not by contextlib: twenty of them per request would cost 30
    us."""

    __slots__ = ("_by_reference", "_context", "_got", "_release")

    def __init__(self, context: c_void_p, release: Any, got: c_void_p, by_reference: bool) -> None:
        self._context, self._release, self._got, self._by_reference = context, release, got, by_reference

    def __enter__(self) -> c_void_p:
        return self._got

    def __exit__(self, *_: object) -> None:
        if self._got.value is not None:
            self._release(self._context, byref(self._got) if self._by_reference else self._got)


def realm_of(principal: str) -> str:
    return principal.rpartition("@")[2]


def _bytes(text: str) -> bytes:
    return text.encode(errors=_ESCAPED)


def _text(string: c_void_p) -> str:
    return ctypes.string_at(string).decode(errors=_ESCAPED) if string.value is not None else ""
