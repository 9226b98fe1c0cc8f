"""The keys that are marked `auto`: their auth tokens go into the user keyring when the daemon starts, at login.

Nobody is asked for anything: an auth token says where the passphrase is to be found, and a key is opened when it is
needed. No key module is loaded for it. In the process that becomes the daemon: what reads the entries would cost the
daemon a megabyte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from upcall.kernel import keyring
from upcall.keys.store import SUFFIX, Entry, KeyStore, check_auto
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok

_MOST: Final = 100  # arguments


def add_auto_keys() -> list[str]:
    """What became of each, as the daemon's arguments: `added=SIGNATURE=NAME`, `not-added=FILE=WHY`.

    One that cannot be added hurts no other. What stands in the user keyring already stays as it is."""
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
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one, the others are added
            told.append(_failed(store.directory / f"{name}{SUFFIX}", error))
    return told[:_MOST]


def _add(entry: Entry) -> bool:
    """Whether it was to be added still."""
    check_auto(entry.source)
    if keyring.find(entry.signature) is not None:
        return False
    keyring.add_user_key(entry.signature, pack_auth_tok(AuthTok(entry.signature, entry.module, entry.blob or b"")))
    return True


def _failed(file: Path, error: Exception) -> str:
    """An entry holds no secret, nor does what is wrong with it."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"not-added={str(file).replace('=', '?')}={why}".replace("\0", "?")
