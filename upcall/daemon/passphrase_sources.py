"""Where the daemon finds a passphrase that it does not keep itself."""

from __future__ import annotations

from upcall.core.errors import ModuleFailed, Refused, UpcallError

_KEYRING_PATIENCE = 2.0  # seconds: the kernel's requester waits for 3


def fetch(signature: str, source: str) -> bytearray:
    """The passphrase that a key's auth token says is kept in `source`: keyring, file:/path or none.

    Imported only when one is needed: most daemons never are asked for one.
    """
    from upcall.keys.passphrase import fetch_from_keyring, from_file

    try:
        if source == "none":
            return bytearray()
        if source == "keyring":
            return fetch_from_keyring(signature, _KEYRING_PATIENCE)
        if source.startswith("file:"):
            return from_file(source.removeprefix("file:"))
    except (UpcallError, OSError) as error:
        raise ModuleFailed(str(error)) from error
    raise Refused("locked")
