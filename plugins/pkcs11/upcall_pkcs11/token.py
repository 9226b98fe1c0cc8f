"""Manages a token's session, which all its keys share, because a login applies to the token and the process."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import pkcs11

from upcall.core.errors import ModuleFailed, UsageError
from upcall_pkcs11.library import Library, TokenName, name_of_token
from upcall_pkcs11.pins import Pins

PROBE_EVERY = 1.0  # seconds between checks that the token is present; one takes SoftHSM 140 us

_GONE = (
    pkcs11.DeviceError,
    pkcs11.DeviceRemoved,
    pkcs11.KeyHandleInvalid,
    pkcs11.ObjectHandleInvalid,
    pkcs11.SessionClosed,
    pkcs11.SessionHandleInvalid,
    pkcs11.SlotIDInvalid,
    pkcs11.TokenNotPresent,
    pkcs11.TokenNotRecognised,
    pkcs11.UserNotLoggedIn,
)
_UNCLEAR = (pkcs11.GeneralError, pkcs11.FunctionFailed)  # SoftHSM: wrong OAEP padding, or a lost token
_UNFIT = (pkcs11.PinInvalid, pkcs11.PinLenRange)  # a new PIN: C_SetPIN
_WRONG_PIN = (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange)


class Lost(Exception):
    """The session has ended, or the token is not present. `era`: the number of that session."""

    def __init__(self, era: int) -> None:
        self.era = era


class _Pin:
    """Passes a PIN to python-pkcs11 in place of a str, by its method `encode`: the PIN stays in a buffer that can be
    wiped."""

    def __init__(self, pin: bytearray) -> None:
        self._pin = pin

    def encode(self, _encoding: str) -> bytearray:
        return self._pin


class Token:
    """A token in use. Obtained by `use`, released by `release`. Thread-safe. `era`: the number of its current session;
    objects are valid in one session only."""

    def __init__(self, library: Library, name: TokenName) -> None:
        self.library, self.name = library, name
        self.id = str(name.uri(library.path)._replace(module_path=None))  # for Secrets
        self.era = 0
        self.users = 0
        self._session: pkcs11.Session | None = None
        self._logged_in = False
        self._gone = False
        self._logging_in = threading.Lock()  # one thread asks for the PIN, others wait for the result
        self._wrong = 0  # logins that the token has refused
        self._pin_locked = False
        self._probed = time.monotonic()

    def __str__(self) -> str:
        return str(self.name)

    def release(self) -> None:
        """Releases the token. Must be called once for each `use`. The last call logs out."""
        if os.getpid() != self.library.pid:
            return
        with self.library.lock:
            self.users -= 1
            if self.users == 0:
                self._close()
                _tokens.pop((self.library.path, self.name), None)

    # --- being there ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self, *, writing: bool = False) -> Iterator[pkcs11.Session]:
        """A context with the session, and the lock held. Lost; ModuleFailed for other failures of the token.

        `writing`: a separate read-write session, closed at the end.
        """
        with self.library.lock, _Translated(self):
            if self._session is None:
                self._session = self._find().open()
                self._opened()
            if not writing:
                yield self._session
                return
            own = self._find().open(rw=True)
            try:
                yield own
            finally:
                with contextlib.suppress(pkcs11.PKCS11Error):
                    own.close()

    def _find(self) -> pkcs11.Token:
        found = self.library.tokens(self.name.uri(self.library.path))
        if len(found) != 1:
            self._gone = not found
            why = "is not there: it was taken out, or its library does not see it" if not found else "is there twice"
            raise ModuleFailed(f"{self} {why}")
        return found[0]

    def _opened(self) -> None:
        self.era += 1
        self.library.in_use.add(self)
        self._gone, self._probed = False, time.monotonic()

    def drop(self, era: int) -> None:
        """Closes a lost session, unless another thread has replaced it already."""
        with self.library.lock:
            if self.era == era:
                self._close()

    def _close(self) -> None:
        if self._session is None:
            return
        session, self._session, self._logged_in = self._session, None, False
        self.library.in_use.discard(self)
        with contextlib.suppress(pkcs11.PKCS11Error):
            session.close()  # logs out, too

    def gone(self) -> bool:
        """Returns whether the token was removed, as of the last check; checks at most once per second.

        Does not block: if another thread uses the library, that thread will notice.
        """
        now = time.monotonic()
        if self._gone or now < self._probed + PROBE_EVERY or not self.library.lock.acquire(blocking=False):
            return self._gone
        try:
            self._probed = now
            if self._session is not None and not self.there():
                self._gone = True
                self._close()
        finally:
            self.library.lock.release()
        return self._gone

    def there(self) -> bool:
        """Returns whether the session's slot still holds this token. The caller holds the lock."""
        if self._session is None:
            return False
        try:
            return name_of_token(self._session.token.slot.get_token()) == self.name
        except pkcs11.PKCS11Error:
            return False

    # --- the PIN -------------------------------------------------------------------------------------------

    def log_in(self, pins: Pins) -> None:
        """Logs in, unless the token is logged in. Refused by `pins`; ModuleFailed if the PIN is wrong. Does not hold
        the lock during a prompt."""
        if os.getpid() != self.library.pid:
            raise ModuleFailed(f"{self}: belongs to the process that opened it, not to its forks")
        seen = self._wrong
        if self._is_logged_in():
            return
        with self._logging_in:
            if self._is_logged_in():
                return
            if self._wrong != seen:
                raise ModuleFailed(f"{self}: the PIN was wrong")  # by another thread: must not be tried again
            with self.library.lock:
                prompt = self._prompt(pins)
            pin = pins.pin(self.id, prompt)
            try:
                self._try_pin(pin, pins)
            finally:
                pin[:] = bytes(len(pin))

    def change_pin(self, pins: Pins, new: bytearray) -> None:
        """Changes the user PIN by C_SetPIN. Lost; Refused by `pins`; ModuleFailed if the present PIN is wrong;
        UsageError if the token does not take the new one."""
        with self._logging_in:
            with self.library.lock:
                prompt = self._prompt(pins)
            pin = pins.pin(self.id, prompt)
            try:
                with self.session(writing=True) as session:
                    failure = self._try_change(session, pin, new)
            finally:
                pin[:] = bytes(len(pin))
            pins.verdict(self.id, failure is None)
            if failure is not None:
                raise failure

    def _try_change(self, session: pkcs11.Session, pin: bytearray, new: bytearray) -> ModuleFailed | None:
        """Calls C_SetPIN once. Returns why the present PIN was refused; None if it was not."""
        try:
            session.set_pin(_Pin(pin), _Pin(new))  # type: ignore[arg-type] # it only encodes them
        except pkcs11.PinIncorrect:
            self._wrong += 1
            return ModuleFailed(f"{self}: the PIN was wrong{self._tries_left()}")
        except pkcs11.PinLocked:
            self._wrong, self._pin_locked = self._wrong + 1, True
            return self._locked()
        except _UNFIT:
            raise UsageError(f"{self}: does not take a PIN of {len(new)} characters, or not of these") from None
        return None

    def _is_logged_in(self) -> bool:
        with self.library.lock:
            return self._logged_in and self._session is not None

    def _prompt(self, pins: Pins) -> str:
        flags = self._find().flags
        if self._pin_locked or flags & pkcs11.TokenFlag.USER_PIN_LOCKED:
            raise self._locked()
        if not flags & pkcs11.TokenFlag.USER_PIN_INITIALIZED:
            raise ModuleFailed(f"{self}: has no user PIN yet, its own tool sets one")
        last = bool(flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY)
        if last and pins.careful:
            raise ModuleFailed(f"{self}: a single try is left before its PIN is locked, and only a person may have it")
        return f"PIN of the {self}" + (", the last try before it is locked" if last else "")

    def _locked(self) -> ModuleFailed:
        return ModuleFailed(f"{self}: its PIN is locked after too many wrong ones; its own tool unlocks it")

    def _tries_left(self) -> str:
        """Returns what the token says of further wrong PINs, as the end of a sentence. Tokens need not say anything,
        and give no number. The caller holds the lock."""
        try:
            flags = self._find().flags
        except (pkcs11.PKCS11Error, ModuleFailed, Lost):
            return ""
        if flags & pkcs11.TokenFlag.USER_PIN_LOCKED:
            return ", and is locked now: the token's own tool unlocks it"
        if flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY:
            return ", and one try is left before the token locks it"
        return ", and few tries are left" if flags & pkcs11.TokenFlag.USER_PIN_COUNT_LOW else ""

    def _try_pin(self, pin: bytearray, pins: Pins) -> None:
        """Calls C_Login once. python-pkcs11 logs in only while opening a session, and leaves it open on failure."""
        failure: ModuleFailed | None = None
        with self.library.lock, _Translated(self):
            try:
                session = self._find().open(user_pin=_Pin(pin))
            except pkcs11.UserAlreadyLoggedIn:
                if self._session is None:
                    self._session = self._find().open()
                    self._opened()
                self._logged_in = True
                return  # the token has not checked the PIN: no verdict
            except _WRONG_PIN:
                self._wrong += 1
                failure = ModuleFailed(f"{self}: the PIN was wrong{self._tries_left()}")
            except pkcs11.PinLocked:
                self._wrong, self._pin_locked = self._wrong + 1, True
                failure = self._locked()
            except pkcs11.UserPinNotInitialized:
                raise ModuleFailed(f"{self}: has no user PIN yet, its own tool sets one") from None
            else:
                old, self._session, self._logged_in = self._session, session, True
                if old is None:
                    self._opened()
                else:
                    self.era += 1
                    with contextlib.suppress(pkcs11.PKCS11Error):
                        old.close()
        pins.verdict(self.id, failure is None)
        if failure is not None:
            raise failure


class _Translated:
    """A context that translates PKCS11Error to Lost or ModuleFailed. The caller holds the lock."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, pkcs11.PKCS11Error):
            return
        # an error without a class of its own: C_Finalize was called by other code
        if isinstance(error, _GONE) or type(error) is pkcs11.PKCS11Error:
            raise Lost(self._token.era) from None
        if isinstance(error, _UNCLEAR) and not self._token.there():
            raise Lost(self._token.era) from None
        raise ModuleFailed(f"{self._token}: {type(error).__name__}") from None


_tokens: dict[tuple[str, TokenName], Token] = {}


def use(library: Library, name: TokenName) -> Token:
    """Returns the process's only `Token` for a token. The caller must `release` it."""
    with library.lock:
        token = _tokens.get((library.path, name))
        if token is None or token.library is not library:  # also if it is the parent's, in a forked process
            token = _tokens[library.path, name] = Token(library, name)
        token.users += 1
        return token
