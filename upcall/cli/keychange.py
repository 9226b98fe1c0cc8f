"""Lets a command change the key store: one command at a time, after interrupted ones were finished or undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from upcall.cli import error_text, output
from upcall.core.errors import UpcallError
from upcall.kernel import keyring
from upcall.keys import replacing
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok, take_auth_tok


@contextlib.contextmanager
def changing(store: KeyStore, *names: str) -> Iterator[None]:
    """A context for changing the store. What an interrupted command has left is finished or undone first, with a note;
    if that fails for a key of these names, so does the command."""
    with store.changing():
        for left in replacing.leftovers(store):
            try:
                done = resume(store, left)
            except (UpcallError, OSError) as error:
                if left.name in names:
                    raise
                done = f"{left.what}, and cannot be resumed: {error_text(error)}"
            output.note(f"{done}")
        yield


def resume(store: KeyStore, left: replacing.Leftover) -> str:
    """Finishes or undoes what an interrupted command has left, within `KeyStore.changing`. Returns what was done, for
    people."""
    if not left.name:
        left.path.unlink(missing_ok=True)
        return f"removed {left.path}, {left.what}"
    resumed = replacing.resume(store, left.name)
    if resumed is None or not resumed.changed:
        return f"{left.what}: undone, the passphrase from before counts"
    entry = resumed.entry
    again = refresh_token(entry)
    forget_passphrase(entry)
    replacing.end(store, left.name)
    return f"{left.what}: finished, the new passphrase counts{again}"


def refresh_token(entry: Entry) -> str:
    """Puts the entry's blob into the key's auth token, if that is in the user keyring. Returns what a person must do
    besides: a compat key's token holds the passphrase, which is not known here."""
    keyring.ensure_user_keyring_linked()
    serial = keyring.find(entry.signature)
    if serial is None:
        return ""
    if entry.blob is None:
        keyring.unlink(serial)
        return f"; `upcall key add {entry.name}` makes a new auth token"
    with contextlib.suppress(UpcallError, OSError):
        if take_auth_tok(keyring.read(serial)).blob == entry.blob:
            return ""
    put_token(entry, entry.blob)
    return ""


def put_token(entry: Entry, blob: bytes) -> None:
    keyring.add_user_key(entry.signature, pack_auth_tok(AuthTok(entry.signature, entry.module, blob)))


def forget_passphrase(entry: Entry, new: bytearray | None = None) -> None:
    """Has the daemon, if it runs, close a key and forget its passphrase or PIN. It gets the new one, for a key whose
    passphrase is kept nowhere else. A key that is locked stays so."""
    from upcall.process.control import DaemonControl, NoDaemon

    try:
        with DaemonControl() as daemon:
            if _is_locked(daemon.status(), entry.signature):
                return
            daemon.lock(entry.signature)  # forgets PINs, too
            daemon.unlock(entry.signature, new.copy() if new and entry.source == "ask" else bytearray())
    except NoDaemon:
        pass  # no process holds the key


def _is_locked(status: dict[str, object], signature: str) -> bool:
    """Returns whether the key is locked by itself, or all keys are: then the daemon holds no passphrase of it."""
    keys = status.get("keys")
    found = [key for key in keys if isinstance(key, dict) and key.get("signature") == signature] if keys else []  # type: ignore[attr-defined]
    if any(key.get("locked") for key in found):
        return True
    return bool(status.get("held")) and not any(key.get("open") for key in found)
