"""`upcall key remove`."""

from __future__ import annotations

import errno
from pathlib import Path

import click

from upcall.cli import completing, output
from upcall.cli.asking import confirm
from upcall.cli.keychange import changing
from upcall.core.errors import UsageError
from upcall.kernel import keyring
from upcall.keys.mounts import MountStore
from upcall.keys.passphrase import delete_from_keyring
from upcall.keys.sharing import Sharing, sharing
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.packets import is_signature


@click.command(short_help="Remove a key from keyring and daemon, and delete it.")
@click.argument("name", shell_complete=completing.keys)
@click.option("--keyring-only", is_flag=True, help="Remove it from the user keyring only; the files stay.")
@click.option(
    "--delete-file", is_flag=True, help="Delete the key file, too, although `key import` left it where it was."
)
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
def remove(name: str, keyring_only: bool, delete_file: bool, yes: bool) -> None:
    """Remove a key, given its NAME or signature, from the user keyring and the daemon, and delete its files.

    Asks first; nothing is changed before the answer. A key file that `key generate` put into upcall's own folder is
    deleted. Any other is kept unless --delete-file is given. What another key of yours uses (its file, or the auth
    token of its signature) is always kept. A key in a token or TPM is never deleted.

    The question names the mounts that use the key. The passphrase that the keyring library keeps for it is deleted
    with the key, unless the key file is kept.

    \b
    Exit codes: 0; 1 the answer was no; 64 there is no such key, no terminal to ask on, or another key needs the file.

    \b
    Examples:
      $ upcall key remove work
      $ upcall key remove work --yes
    """
    store = KeyStore()
    entry = _entry(store, name)
    if keyring_only or entry is None:
        if delete_file:
            raise UsageError("--delete-file: " + ("goes not with --keyring-only" if keyring_only else _NO_ENTRY))
        signature = name if entry is None else entry.signature
        if not (yes or keyring_only):
            confirm(f"Take the auth token {signature} out of the user keyring? {_NO_ENTRY.capitalize()}.")
        _forget(signature)
        output.done(f"{name} is out of the user keyring" + ("" if entry is None else "; its files are kept"))
        return
    shared = sharing(store, entry)
    file = _doomed(store, entry, shared, delete_file)
    if not yes:
        questions = (f"Delete the key {entry.name}?", *_mounts(entry, shared), _consequence(entry, shared, file))
        confirm(" ".join((*questions, *([_DELETED_TOO] if _passphrase_goes(entry, shared, file) else []))))
    with changing(store, entry.name):
        if store.load(entry.name) != entry or sharing(store, entry) != shared:
            raise BlockingIOError(
                errno.EAGAIN, "another command has changed the keys meanwhile: try again", entry.name
            )
        if not shared.same_key:
            _forget(entry.signature)
        if file is not None:
            file.unlink(missing_ok=True)
        store.remove(entry.name)
        if _passphrase_goes(entry, shared, file):
            delete_from_keyring(entry.signature)
    output.done(f"the key {entry.name} is removed" + (f", and {file} is deleted" if file is not None else ""))
    if entry.path is not None and file is None:
        output.note(f"kept {_kept(entry, shared)}")


_DELETED_TOO = "The passphrase that the keyring library keeps for it is deleted, too."
_NO_ENTRY = "another program put it there, and upcall has no files of it"


def _entry(store: KeyStore, name: str) -> Entry | None:
    """Returns the entry of a key; None if there is only something in the user keyring under this signature. UsageError
    if there is neither, or two entries have this signature."""
    if not is_signature(name) or name in store.names():
        return store.load(name)
    named = store.with_signature(name)
    if len(named) > 1:
        raise UsageError(f"more than one key has the signature {name}: {', '.join(named)}; name one of them")
    keyring.ensure_user_keyring_linked()
    if not named and keyring.find(name) is not None:
        return None
    return store.load(named[0] if named else name)


def _doomed(store: KeyStore, entry: Entry, shared: Sharing, delete_file: bool) -> Path | None:
    """Returns the key file to delete; None if there is none, or it is to be kept. UsageError if `delete_file` is asked
    for in vain."""
    if entry.path is None:
        if delete_file:
            raise UsageError(f"--delete-file: the key {entry.name} has no key file")
        return None
    if shared.same_file:
        if delete_file:
            raise UsageError(f"--delete-file: {entry.path} is also the file of the key {shared.same_file[0]}")
        return None
    if delete_file or (store.owns_file(entry) and not shared.unknown):
        return Path(entry.path)
    return None


def _mounts(entry: Entry, shared: Sharing) -> list[str]:
    """Returns a sentence that names the mounts that need this key; none if an equal key stays."""
    if shared.same_key:
        return []
    mounts = MountStore().all()
    names = [one.name for one in mounts if entry.signature in (*one.signatures, one.names_signature)]
    return [f"Mounts that use it: {', '.join(names)}."] if names else []


def _passphrase_goes(entry: Entry, shared: Sharing, file: Path | None) -> bool:
    """Returns whether the keyring library's passphrase is deleted: nothing needs it if no key file and no equal key
    stays. An entry that cannot be read may be an equal key."""
    kept = entry.path is not None and file is None
    return entry.source == "keyring" and not (kept or shared.same_key or shared.unknown)


def _consequence(entry: Entry, shared: Sharing, file: Path | None) -> str:
    if file is not None:
        return f"What is encrypted with it is lost if there is no other copy of {file}."
    if shared.same_key:
        return f"It is the same key as {shared.same_key[0]}, which stays and keeps working."
    if entry.path is None:
        return "Its entry says how the key is found, or made: what is encrypted with it may be lost without a copy."
    return f"Its entry goes; {_kept(entry, shared)} stays."


def _kept(entry: Entry, shared: Sharing) -> str:
    if shared.same_file:
        return f"{entry.path}, which the key {shared.same_file[0]} uses"
    if shared.unknown:
        return f"{entry.path}, which the damaged entry {shared.unknown[0]} may use"
    return f"{entry.path}"


def _forget(signature: str) -> None:
    from upcall.process.control import DaemonControl, NoDaemon

    serial = keyring.find(signature)
    if serial is not None:
        keyring.unlink(serial)
    try:
        with DaemonControl() as daemon:
            daemon.lock(signature)
    except NoDaemon:
        pass  # no daemon: no process holds the key
