"""Adds the auth tokens of keys that are marked `auto` to the user keyring when the daemon starts, at login.

Opens no prompt and loads no key module: an auth token says where the passphrase is, and a key is opened when it is
first used. Runs before the daemon's exec: the code that reads the entries would cost the daemon a megabyte.
"""

from __future__ import annotations

from typing import Final

from upcall.kernel import keyring
from upcall.keys.store import SUFFIX, Entry, KeyStore, check_auto
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.ecryptfs.settings import AddedKey, FailedKey, LoginKeys

# What is reported of more keys must fit into an argument (upcall/process/settings.py).
_MOST_ADDED, _MOST_FAILED = 100, 30  # keys
_MOST_WHY: Final = 300  # characters


def add_auto_keys() -> LoginKeys:
    """Adds the keys. Returns the results.

    A failure does not affect other keys. Auth tokens that are in the user keyring are not replaced. Raises nothing."""
    store = KeyStore()
    added, failed = [], []
    try:
        names = store.names()
    except OSError as error:
        return LoginKeys(store.directory, (), (_failed("", error),))
    for name in names:
        try:
            entry = store.load(name)
            if entry.auto and add_token(entry):
                added.append(AddedKey(name, entry.signature))
        except Exception as error:  # noqa: BLE001 - a failure must not affect other keys
            failed.append(_failed(f"{name}{SUFFIX}", error))
    if not added and not failed:
        return LoginKeys()
    return LoginKeys(store.directory, tuple(added[:_MOST_ADDED]), tuple(failed[:_MOST_FAILED]))


def add_token(entry: Entry) -> bool:
    """Adds one auth token without a passphrase. False if it is in the keyring already. UsageError for a compat key."""
    check_auto(entry.source)
    if keyring.find(entry.signature) is not None:
        return False
    keyring.add_user_key(entry.signature, pack_auth_tok(AuthTok(entry.signature, entry.module, entry.blob or b"")))
    return True


def _failed(file: str, error: Exception) -> FailedKey:
    """Entries and their errors contain no secret."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return FailedKey(file, why[:_MOST_WHY].replace("\0", "?"))
