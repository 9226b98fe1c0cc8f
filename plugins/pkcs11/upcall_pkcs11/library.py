"""PKCS #11 libraries: loaded once per process, entered by one thread at a time.

C_Initialize belongs to the process. python-pkcs11 calls it without arguments, which promises the library that there
are no threads: sessions of their own do not help them (SoftHSM ends in a double free), one lock around
everything does. A hardware token does one thing at a time in any case.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import NamedTuple, Protocol

import pkcs11

from upcall.core.errors import ModuleFailed
from upcall_pkcs11.uri import Uri


class TokenName(NamedTuple):
    """Which token it is, by what it says about itself."""

    label: str
    serial: str
    manufacturer: str
    model: str

    def __str__(self) -> str:
        return f"token {self.label!r} (serial {self.serial})"

    def fits(self, uri: Uri) -> bool:
        said = (uri.token, uri.serial, uri.manufacturer, uri.model)
        return all(want is None or want == have for want, have in zip(said, self, strict=True))

    def uri(self, path: str) -> Uri:
        return Uri(
            token=self.label,
            serial=self.serial,
            manufacturer=self.manufacturer,
            model=self.model,
            module_path=path,
        )


def name_of_token(token: pkcs11.Token) -> TokenName:
    serial = token.serial.rstrip(b"\0").decode("utf-8", "replace")
    return TokenName(token.label, serial, token.manufacturer_id, token.model)


class InUse(Protocol):
    """A token with a session (upcall_pkcs11.token)."""

    era: int

    def there(self) -> bool: ...
    def drop(self, era: int) -> None: ...


class Library:
    """`lock` is held around every call into the library, and around every use of its objects."""

    def __init__(self, path: str, forked: bool = False) -> None:
        self.path = path
        self.pid = os.getpid()  # a fork has a copy of the library that must not be used
        self.lock = threading.RLock()
        self.in_use: set[InUse] = set()  # tokens with a session; without any, the library may be started anew
        try:
            self._lib = pkcs11.lib(path)
            if forked:
                self._start_anew()
        except pkcs11.PKCS11Error as error:
            raise ModuleFailed(f"{path}: cannot be used as a PKCS #11 library: {_why(error, path)}") from None

    def tokens(self, uri: Uri) -> list[pkcs11.Token]:
        """The tokens that are there now and fit. ModuleFailed if the library fails.

        Some libraries look for tokens only when they start (SoftHSM does), so one in which nothing lives any more
        is started anew when it knows of none.
        """
        with self.lock:
            try:
                found = self._look(uri)
                why = ""
            except pkcs11.PKCS11Error as error:
                found, why = [], _why(error, self.path)
            if not found and not self._lives():
                try:
                    self._start_anew()
                    return self._look(uri)
                except pkcs11.PKCS11Error as error:
                    why = _why(error, self.path)
            if why:
                raise ModuleFailed(f"{self.path}: the PKCS #11 library fails: {why}")
            return found

    def _lives(self) -> bool:
        for token in list(self.in_use):
            if not token.there():
                token.drop(token.era)
        return bool(self.in_use)

    def _look(self, uri: Uri) -> list[pkcs11.Token]:
        found = []
        for slot in self._lib.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except pkcs11.PKCS11Error:
                continue  # one that was taken out must not hide the others
            if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED and name_of_token(token).fits(uri):
                found.append(token)
        return found

    def _start_anew(self) -> None:
        if self._lib.initialized:
            with contextlib.suppress(pkcs11.PKCS11Error):  # somebody else in the process did it
                self._lib.finalize()
        self._lib.initialize()


def _why(error: pkcs11.PKCS11Error, path: str) -> str:
    """Its own words, which python-pkcs11 has for few errors, without the path, or its name."""
    text = str(error).removeprefix(f"OS exception while loading {path}: ").removeprefix(f"{path}: ")
    return text or type(error).__name__


_libraries: dict[str, Library] = {}
_loading = threading.Lock()


def load(path: str) -> Library:
    """The library, loaded. ModuleFailed if it cannot be, or others could have changed it.

    The path comes from an auth token, which every process of the user can write.
    """
    real = os.path.realpath(path)  # two names of one library would be initialized twice, and refuse that
    with _loading:
        known = _libraries.get(real)
        if known is None or known.pid != os.getpid():
            _check(real)
            _libraries[real] = Library(real, forked=known is not None)
        return _libraries[real]


def _check(path: str) -> None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise ModuleFailed(f"{path}: the PKCS #11 library cannot be loaded: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModuleFailed(f"{path}: a PKCS #11 library is a regular file")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise ModuleFailed(f"{path}: others can write it, so it is not loaded as a PKCS #11 library")
