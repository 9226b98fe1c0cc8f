"""Fetches passphrases that the daemon does not keep in memory: from the `keyring` library or a file."""

from __future__ import annotations

from typing import Final

from upcall.core.errors import ModuleFailed, Refused, UpcallError, error_words

_KEYRING_PATIENCE: Final = 2.0  # seconds: the kernel's requester waits for 3


def fetch(signature: str, source: str, timeout: float = _KEYRING_PATIENCE) -> bytearray:
    """Returns a key's passphrase; the caller wipes it. `source`: "keyring", "file:/path" or "none", as the auth token
    says. `timeout`: seconds for the library.

    Imported only when it is called, because most daemons never need it.
    """
    from upcall.keys.passphrase import fetch_from_keyring, from_file

    try:
        if source == "none":
            return bytearray()
        if source == "keyring":
            return fetch_from_keyring(signature, timeout)
        if source.startswith("file:"):
            return from_file(source.removeprefix("file:"))
    except (UpcallError, OSError) as error:
        raise ModuleFailed(error_words(error)) from error
    raise Refused("locked")
