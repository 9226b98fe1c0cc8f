"""The keys that are marked `auto`: their auth tokens go into the user keyring when the daemon starts, at login.

Nobody is asked for anything: an auth token says where the passphrase is to be found, and a key is opened when it is
needed. No key module is loaded for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from upcall.kernel import keyring
from upcall.log import EventLog
from upcall.wire.authtok import AuthTok, pack_auth_tok

if TYPE_CHECKING:
    from upcall.keystore import Entry


class NotAdded(NamedTuple):
    """A key that could not be added, or an entry that cannot be read, and why."""

    file: str
    why: str


def add_auto_keys(log: EventLog) -> tuple[NotAdded, ...]:
    """One that cannot be added hurts no other: it is logged and given. What stands in the user keyring already stays
    as it is."""
    failed: list[NotAdded] = []

    def note(path: Path, error: Exception) -> None:
        failed.append(NotAdded(str(path), _words(error)))
        log("key-not-added", file=path, why=failed[-1].why)

    folder = _directory()
    try:
        if not any(name.endswith(".toml") for name in os.listdir(folder)):  # noqa: PTH208
            return ()
    except FileNotFoundError:
        return ()
    except OSError as error:
        note(folder, error)
        return tuple(failed)
    from upcall.keystore import SUFFIX, KeyStore  # 0.6 MB and 6 ms, for those who have keys

    store = KeyStore(folder)
    for name in store.names():
        try:
            _add(store.load(name), log)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one, the others are added
            note(folder / f"{name}{SUFFIX}", error)
    return tuple(failed)


def _directory() -> Path:
    """As `upcall.keystore.default_directory`, which is not imported for it."""
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if data.startswith("/") else Path.home() / ".local" / "share"
    return base / "upcall" / "keys"


def _add(entry: Entry, log: EventLog) -> None:
    from upcall.keystore import check_auto

    if not entry.auto:
        return
    check_auto(entry.source)
    if keyring.find(entry.signature) is not None:
        return
    keyring.add_user_key(entry.signature, pack_auth_tok(AuthTok(entry.signature, entry.module, entry.blob or b"")))
    log("key-added", name=entry.name, signature=entry.signature)


def _words(error: Exception) -> str:
    """What is wrong; an entry holds no secret."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
