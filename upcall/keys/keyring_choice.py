"""Which backend the `keyring` library chooses here, and what is to be expected of it. For short-lived processes."""

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
    """None where nobody here knows: a backend of somebody else's."""

    backend: str  # as `keyring --list-backends` calls it; "" if the library has none to offer
    priority: float
    headless: bool | None  # works without a desktop and without a person
    lasting: bool | None  # still has a password after the next boot
    why: str  # for people


def chosen() -> Choice:
    """What `upcall key --passphrase-keyring` would use in this environment. Never raises for a bad configuration."""
    try:
        backend = _first(get_keyring())
        name = f"{type(backend).__module__}.{type(backend).__name__}"
        priority = float(backend.priority)
    except Exception as error:  # noqa: BLE001 - whatever the configured backend's import raises
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
    """Where a password is put: the chainer, which the library takes where there are several, sets it in the first."""
    if isinstance(backend, chainer.ChainerBackend):
        first: KeyringBackend = backend.backends[0]
        return first
    return backend


def _failure(backend: KernelKeyring) -> str:
    """Why a password that was set does not come back; "" if it does."""
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
