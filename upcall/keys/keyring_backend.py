"""Implements a backend of the `keyring` library in the kernel's keyrings, for machines without a desktop.

A password is a key of type "user" with the description `upcall:SERVICE:USER`, both names quoted as in URLs. These keys
are in a keyring of upcall's own, so that they can be listed and removed together. That keyring is in one of

    persistent   the user's persistent keyring: survives logout, and expires three days after the last access to a
                 password (/proc/sys/kernel/keys/persistent_keyring_expiry, in seconds)
    user         the user keyring: survives until the next boot

The persistent keyring is the default if the kernel supports it: it survives a session, and unused passwords expire. No
password survives a boot in either keyring.

Reading needs possession. Cron jobs, services and processes whose session keyring was revoked do not possess either
keyring. So each call first links the outer keyring into its process keyring (see upcall.kernel.keyring).

Properties, set by KEYRING_PROPERTY_* or `with_properties`, override [keyring] of upcall's configuration:

    where        "persistent" or "user"
    timeout      seconds until a password expires, for passwords set from now on; 0, the default: never
    container    the name of upcall's own keyring, "upcall"; not in the configuration

Errors and reprs contain no passwords. Python cannot wipe strings; the kernel wipes keys that it removes.
Source: keyrings(7), persistent-keyring(7), user-keyring(7).
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from keyring.backend import KeyringBackend
from keyring.credentials import Credential, SimpleCredential
from keyring.errors import KeyringError, PasswordDeleteError, PasswordSetError

from upcall.core.errors import UpcallError
from upcall.kernel import keyring as kernel

MAX_DESCRIPTION: Final = 4095  # bytes: a page with its NUL, KEY_MAX_DESC_SIZE in security/keys/keyctl.c
MAX_TIMEOUT: Final = 0xFFFFFFFF  # seconds
PERSISTENT: Final = "persistent"
USER: Final = "user"

_QUOTA = (
    "the kernel holds no more keys for this user: /proc/key-users says how many there are, "
    "/proc/sys/kernel/keys how many there may be"
)
_WHY_NOT = {
    errno.ENOSYS: "this kernel has no keyrings",
    errno.EPERM: "this process may not use the kernel's keyrings, as in most containers",
    errno.EACCES: "this process may not use the kernel's keyrings",
    errno.EOPNOTSUPP: "Linux 5.3 or newer is needed",
}
# A new key gets its time-out and permissions in the process keyring, which the threads share, and is then moved.
_staging = threading.Lock()
# Seconds between attempts: replaced and deleted keys count against the quota until the kernel's garbage collection.
_PAUSES = (0.01, 0.05, 0.2)


def unusable() -> str:
    """Returns why this backend cannot work on this machine, for people; "" if it can."""
    try:
        able = kernel.capabilities()
    except OSError as error:
        return f"{_WHY_NOT.get(error.errno or 0, 'the kernel refuses')} ({_said(error)})"
    return "" if able & kernel.MOVE else _WHY_NOT[errno.EOPNOTSUPP]


class _Priority:
    """The backend's priority for the library: below desktop keyrings (4.8 and more), whose passwords survive a boot,
    and above plaintext files (0.5) and the null backend (0).

    Less than 1, so that programs that require a recommended backend do not choose it. RuntimeError if it cannot work
    here, as the library requires.
    """

    def __get__(self, instance: object, owner: object = None) -> float:
        if why := unusable():
            raise RuntimeError(why)
        return 0.9


class _Rules(NamedTuple):
    where: str  # "": not configured
    timeout: int


class KernelKeyring(KeyringBackend):
    """The backend; see the module's docstring. Errors are KeyringError or its subclasses."""

    priority: Any = _Priority()
    # Must be plain class attributes: the library sets them in the instance's __dict__, as text.
    where: object = None
    timeout: object = None
    container: str = "upcall"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def get_password(self, service: str, username: str) -> str | None:
        description = _description(service, username)
        with _errors_as(KeyringError):
            held = self._held()
            payload = None if held is None else _read(held, description)
        return None if payload is None else _password(payload)

    def set_password(self, service: str, username: str, password: str) -> None:
        """Stores a password. PasswordSetError if it is too long, or the user's key quota is used up."""
        description, payload = _description(service, username), _payload(password)
        if len(description) > MAX_DESCRIPTION:
            raise PasswordSetError(
                f"service and user name are {len(description)} bytes when quoted, at most {MAX_DESCRIPTION} fit"
            )
        if len(payload) > kernel.MAX_PAYLOAD:
            raise PasswordSetError(f"the password is {len(payload)} bytes, at most {kernel.MAX_PAYLOAD} fit")
        rules = self._rules()
        with _errors_as(PasswordSetError):
            for pause in (*_PAUSES, 0):
                try:
                    self._put(rules, description, payload)
                    break
                except OSError as error:
                    if error.errno != errno.EDQUOT or not pause:
                        raise
                time.sleep(pause)

    def _put(self, rules: _Rules, description: str, payload: bytes) -> None:
        with _staging:
            outer = _outer(rules.where)
            held = self._found(outer) or self._made(outer)
            serial = kernel.add_user_key(description, payload, kernel.PROCESS_KEYRING)
            with _unlinked_on_error(serial):
                kernel.set_timeout(serial, rules.timeout)
                kernel.move(serial, kernel.PROCESS_KEYRING, held)

    def delete_password(self, service: str, username: str) -> None:
        """Removes a password. PasswordDeleteError if there is none, or it has expired."""
        description = _description(service, username)
        with _errors_as(PasswordDeleteError):
            held = self._held()
            serial = None if held is None else _find(held, description)
            if held is not None and serial is not None:
                kernel.unlink(serial, held)
                return
        raise PasswordDeleteError("there is no such password")

    def get_credential(self, service: str, username: str | None) -> Credential | None:
        """Returns the credential of this user name; with None, that of the first user name in alphabetical order. None
        if there is no password."""
        names = [username] if username is not None else self._usernames(service)
        for name in names:
            password = self.get_password(service, name)
            if password is not None:
                return SimpleCredential(name, password)
        return None

    def _usernames(self, service: str) -> list[str]:
        prefix = _description(service, "")
        with _errors_as(KeyringError):
            held = self._held()
            keys = [] if held is None else kernel.list_keyring(held)
        found = (key.description for key in keys if key.type == "user" and key.description.startswith(prefix))
        return sorted(unquote(one.removeprefix(prefix), errors="surrogatepass") for one in found)

    # --- the keyring of our own -----------------------------------------------------------------------------

    def _held(self) -> int | None:
        """Returns the serial number of the keyring with the passwords; None if there is none."""
        return self._found(_outer(self._rules().where))

    def _found(self, outer: int) -> int | None:
        return kernel.search(outer, "keyring", self.container)

    def _made(self, outer: int) -> int:
        """Creates the keyring with the passwords. If another process was faster, returns its keyring: with two
        keyrings passwords would be lost."""
        serial = kernel.add_keyring(self.container, kernel.PROCESS_KEYRING)
        with _unlinked_on_error(serial):
            try:
                kernel.move(serial, kernel.PROCESS_KEYRING, outer, exclusive=True)
            except FileExistsError:
                found = self._found(outer)
                if found is not None:
                    kernel.unlink(serial, kernel.PROCESS_KEYRING)
                    return found
                kernel.move(serial, kernel.PROCESS_KEYRING, outer)  # replaces a revoked one
        return serial

    def _rules(self) -> _Rules:
        from upcall.config import settings

        try:
            told = settings("keyring", user=True)
        except (UpcallError, OSError) as error:
            raise KeyringError(str(error)) from error
        where = told.get("where", "") if self.where is None else self.where
        if where not in ("", PERSISTENT, USER):
            raise KeyringError(f"the property where is {where!r}; {PERSISTENT} or {USER} is needed")
        return _Rules(str(where), told.get("timeout", 0) if self.timeout is None else _seconds(self.timeout))


def _seconds(value: object) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_TIMEOUT):
        raise KeyringError(f"the property timeout is {text!r}; seconds from 0 to {MAX_TIMEOUT} are needed")
    return int(text)


def _outer(where: str) -> int:
    """Returns the serial number of the outer keyring, and makes this thread possess it."""
    if where == PERSISTENT or (not where and kernel.capabilities() & kernel.PERSISTENT_KEYRINGS):
        return kernel.link_persistent_keyring()
    kernel.ensure_user_keyring_linked()
    return kernel.USER_KEYRING


def _find(held: int, description: str) -> int | None:
    return kernel.search(held, "user", description) if len(description) <= MAX_DESCRIPTION else None


def _read(held: int, description: str) -> bytes | None:
    serial = _find(held, description)
    if serial is None:
        return None
    try:
        return kernel.read(serial)
    except OSError as error:
        if error.errno in (errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED):  # gone meanwhile
            return None
        raise


# --- what stands in a key -----------------------------------------------------------------------------------


def _description(service: str, username: str) -> str:
    """Returns a key's description, in ASCII. Colons in names are quoted, so that descriptions are unambiguous."""
    return ":".join(["upcall", *(quote(name, safe="/@", errors="surrogatepass") for name in (service, username))])


def _payload(password: str) -> bytes:
    """Returns a password in UTF-8. The kernel refuses empty payloads, so a NUL is appended to an empty password, and
    to one of NULs only."""
    payload = password.encode("utf-8", "surrogatepass")
    return payload if payload.strip(b"\0") else payload + b"\0"


def _password(payload: bytes) -> str:
    if not payload.strip(b"\0"):
        payload = payload[1:]
    try:
        return payload.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        pass  # the exception contains the payload and must not become a context
    raise KeyringError("what the key holds is not UTF-8: this backend did not write it")


# --- errors -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _errors_as(kind: type[KeyringError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(_QUOTA if error.errno == errno.EDQUOT else _said(error)) from error


def _said(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"


@contextlib.contextmanager
def _unlinked_on_error(serial: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            kernel.unlink(serial, kernel.PROCESS_KEYRING)
        raise
