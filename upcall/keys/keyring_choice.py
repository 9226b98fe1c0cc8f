"""Determines the backend that the `keyring` library chooses here, and its properties. For short-lived processes."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from keyring import get_keyring
from keyring.backend import KeyringBackend
from keyring.backends import chainer
from keyring.errors import KeyringError

from upcall.keys.keyring_backend import KernelKeyring, unusable

_DESKTOP = ("keyring.backends.SecretService", "keyring.backends.libsecret", "keyring.backends.kwallet")
_NOTHING = ("keyring.backends.fail", "keyring.backends.null")


class Choice(NamedTuple):
    """The chosen backend. `headless` and `lasting` are None for a backend that upcall does not know."""

    backend: str  # its name in `keyring --list-backends`; "" if the library has none
    priority: float
    headless: bool | None  # works without a desktop and a person
    lasting: bool | None  # passwords survive a boot
    why: str  # for people


def chosen() -> Choice:
    """Returns the backend that `upcall key --passphrase-keyring` would use in this environment. Raises nothing, even
    if the library's configuration is wrong. Imports the library: 100 ms, 12 MB."""
    try:
        backend = _first(get_keyring())
        name = f"{type(backend).__module__}.{type(backend).__name__}"
        priority = float(backend.priority)
    except Exception as error:  # noqa: BLE001 - the import of a configured backend may raise anything
        return Choice("", 0.0, False, False, f"the keyring library cannot start: {_first_line(error)}")
    module = type(backend).__module__
    if isinstance(backend, KernelKeyring):
        failure = _failure(backend)
        why = f"does not work: {failure}" if failure else "the kernel keeps it, at most until the next boot"
        return Choice(name, priority, not failure, False, why)
    if module in _NOTHING:
        why = unusable() or "was not chosen"
        return Choice(name, priority, False, False, f"keeps nothing; the kernel's keyring: {why}")
    if module in _DESKTOP:
        return Choice(name, priority, False, True, "needs the desktop's session, and somebody who unlocks it")
    return Choice(name, priority, None, None, "a backend that upcall knows nothing about")


def _first(backend: KeyringBackend) -> KeyringBackend:
    """Returns the backend that stores passwords: the first one of the library's chainer, which combines several."""
    if isinstance(backend, chainer.ChainerBackend):
        first: KeyringBackend = backend.backends[0]
        return first
    return backend


def _failure(backend: KernelKeyring) -> str:
    """Stores and reads a test password. Returns why that fails; "" if it works."""
    name, word = secrets.token_hex(8), secrets.token_hex(8)
    try:
        backend.set_password("upcall:trial", name, word)
        try:
            return "" if backend.get_password("upcall:trial", name) == word else "what was set does not come back"
        finally:
            backend.delete_password("upcall:trial", name)
    except KeyringError as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
