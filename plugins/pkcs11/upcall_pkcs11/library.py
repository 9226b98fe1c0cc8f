"""Loads PKCS #11 libraries, once per process, and admits one thread at a time.

C_Initialize applies to the process. python-pkcs11 calls it without arguments, which tells the library that only one
thread uses it. A session per thread does not suffice (SoftHSM then frees memory twice), so one lock is held around all
calls. A hardware token handles one command at a time in any case.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import NamedTuple, Protocol

import pkcs11

from upcall.core.errors import ModuleFailed
from upcall.process.trust import Fault, Trust, owners
from upcall_pkcs11.uri import Uri


class TokenName(NamedTuple):
    """Identifies a token by its properties."""

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
    """A token with an open session: upcall_pkcs11.token.Token."""

    era: int

    def there(self) -> bool: ...
    def drop(self, era: int) -> None: ...


class Library:
    """A loaded library. `lock` must be held during each call into it, and each use of its objects."""

    def __init__(self, path: str, forked: bool = False) -> None:
        self.path = path
        self.pid = os.getpid()  # a forked process must not use its copy of the library
        self.lock = threading.RLock()
        self.in_use: set[InUse] = set()  # tokens with a session; only without any may the library be restarted
        try:
            self._lib = pkcs11.lib(path)
            if forked:
                self._start_anew()
        except pkcs11.PKCS11Error as error:
            raise ModuleFailed(f"{path}: cannot be used as a PKCS #11 library: {_why(error, path)}") from None

    def tokens(self, uri: Uri) -> list[pkcs11.Token]:
        """Returns the present tokens that match a URI. ModuleFailed if the library fails.

        Some libraries, such as SoftHSM, search for tokens only when they are initialised. So a library without open
        sessions is initialised again if it has no matching token.
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
                continue  # a removed token must not hide others
            if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED and name_of_token(token).fits(uri):
                found.append(token)
        return found

    def _start_anew(self) -> None:
        if self._lib.initialized:
            with contextlib.suppress(pkcs11.PKCS11Error):  # other code in the process has finalised it
                self._lib.finalize()
        self._lib.initialize()


def _why(error: pkcs11.PKCS11Error, path: str) -> str:
    """Returns the error's text without the path; the error's name if python-pkcs11 has no text for it."""
    text = str(error).removeprefix(f"OS exception while loading {path}: ").removeprefix(f"{path}: ")
    return text or type(error).__name__


_libraries: dict[str, Library] = {}
_loading = threading.Lock()


def load(path: str) -> Library:
    """Returns the library at `path`; loads it on the first call. ModuleFailed if that fails, or other users could
    change the file, or exchange a folder above it between the check and the loading.

    Checked, because the path comes from an auth token, which every process of the user can write, or from a backup,
    which another user may have made.
    """
    real = os.path.realpath(path)  # by two names a library would be initialised twice, which fails
    with _loading:
        known = _libraries.get(real)
        if known is None or known.pid != os.getpid():
            _check(real)
            _libraries[real] = Library(real, forked=known is not None)
        return _libraries[real]


def _check(path: str) -> None:
    try:
        found = Trust(owners()).walk(path)
    except OSError as error:
        raise ModuleFailed(f"{path}: the PKCS #11 library cannot be loaded: {error.strerror}") from None
    if isinstance(found, Fault):
        raise ModuleFailed(f"{path}: not loaded as a PKCS #11 library: {found}; to trust it: {found.command}")
    if not stat.S_ISREG(found.st_mode):
        raise ModuleFailed(f"{path}: a PKCS #11 library is a regular file")
