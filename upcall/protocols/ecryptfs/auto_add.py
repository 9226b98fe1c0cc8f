"""Adds the auth tokens of keys that are marked `auto` to the user keyring when the daemon starts, at login.

Opens no prompt and loads no key module: an auth token says where the passphrase is, and a key is opened when it is
first used. Runs before the daemon's exec: the code that reads the entries would cost the daemon a megabyte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from upcall.kernel import keyring
from upcall.keys.store import SUFFIX, Entry, KeyStore, check_auto
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok

_MOST: Final = 100  # arguments


def add_auto_keys() -> list[str]:
    """Adds the keys. Returns the results as arguments of the daemon: `added=SIGNATURE=NAME`, `not-added=FILE=WHY`.

    A failure does not affect other keys. Auth tokens that are in the user keyring are not replaced. Raises nothing."""
    store = KeyStore()
    try:
        names = store.names()
    except OSError as error:
        return [_failed(store.directory, error)]
    told = []
    for name in names:
        try:
            entry = store.load(name)
            if entry.auto and _add(entry):
                told.append(f"added={entry.signature}={name}")
        except Exception as error:  # noqa: BLE001 - a failure must not affect other keys
            told.append(_failed(store.directory / f"{name}{SUFFIX}", error))
    return told[:_MOST]


def _add(entry: Entry) -> bool:
    """Adds one auth token. False if it is in the keyring already."""
    check_auto(entry.source)
    if keyring.find(entry.signature) is not None:
        return False
    keyring.add_user_key(entry.signature, pack_auth_tok(AuthTok(entry.signature, entry.module, entry.blob or b"")))
    return True


def _failed(file: Path, error: Exception) -> str:
    """The argument for a failure. Entries and their errors contain no secret."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"not-added={str(file).replace('=', '?')}={why}".replace("\0", "?")
