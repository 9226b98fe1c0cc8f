"""Replaces a key's file, its entry and its kept passphrase, so that a command killed at any step loses nothing.

A record beside the entry, `.NAME.passwd`, says what is being done. It is there before anything is changed:

1. record (not ready): the new key file is being written, beside the present one;
2. record (ready): the new file is complete and proved. Then the keyring library gets the passphrase, the new file
   takes the place of the present one, and the new entry that of the present one;
3. no record.

`resume` finishes or undoes what it finds, without a person: nothing has changed until the new file is in its place,
except for the keyring library's passphrase. That opens one of the two files, and so decides.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError
from upcall.keymodule import Enrolled, KeyImporter, Limits, Making
from upcall.keys import plugins
from upcall.keys.enrolment import chosen
from upcall.keys.passphrase import PATIENCE, delete_from_keyring, fetch_from_keyring
from upcall.keys.private_file import read_private, replace_private, sync_folder, wipe, write_new
from upcall.keys.store import SUFFIX, Entry, KeyStore, check_name, parse, text_of

RECORD: Final = ".passwd"  # the suffix of a record; a dot precedes its name
_MAX_RECORD: Final = 64 * 1024  # bytes
_STALE: Final = 60.0  # seconds after which a temporary file of a store that nobody changes is a leftover
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")


class Record(NamedTuple):
    """What is being done to a key."""

    entry: Entry  # the new one
    path: Path  # the key file to be replaced, behind symbolic links
    staged: Path  # the new key file
    ready: bool  # `staged` was written and proved
    leaves_keyring: bool  # the passphrase was kept by the keyring library, and will not be


class Leftover(NamedTuple):
    """What an interrupted command has left."""

    name: str  # of the key; "" if it belongs to none
    path: Path  # the record, or a temporary file
    what: str  # for people


class Replacement:
    """Replaces a key's file and entry, within `KeyStore.changing`. Call `begin`, write to `staged`, call `ready`,
    `commit` and `end` in this order; `undo` instead of `commit` after a failure. OSError."""

    def __init__(self, store: KeyStore, entry: Entry) -> None:
        """`entry`: the present one, which has a key file."""
        self._store, self._name = store, entry.name
        self._target = Path(os.path.realpath(entry.path or ""))
        self.staged = self._target.with_name(f".{self._target.name}.{os.urandom(6).hex()}")
        self._record = Record(entry, self._target, self.staged, ready=False, leaves_keyring=False)

    def begin(self) -> None:
        write_new(record_path(self._store, self._name), _text(self._record))

    def ready(self, new: Entry, leaves_keyring: bool) -> None:
        """Call it when the new file is complete. `new`: the entry that fits it."""
        self._record = self._record._replace(entry=new, ready=True, leaves_keyring=leaves_keyring)
        replace_private(record_path(self._store, self._name), _text(self._record))

    def commit(self) -> None:
        _commit(self._store, self._record)

    def end(self) -> None:
        _end(self._store, self._name)

    def undo(self) -> None:
        _undo(self._store, self._record)


def _commit(store: KeyStore, record: Record) -> None:
    if record.staged.exists():
        record.staged.replace(record.path)
        sync_folder(record.path.parent)
    if store.load(record.entry.name) != record.entry:
        store.replace(record.entry)
    if record.leaves_keyring:
        delete_from_keyring(record.entry.signature)


def _undo(store: KeyStore, record: Record) -> None:
    if record.ready:  # otherwise a missing file would mean that it has taken its place
        replace_private(record_path(store, record.entry.name), _text(record._replace(ready=False)))
    record.staged.unlink(missing_ok=True)
    _end(store, record.entry.name)


def _end(store: KeyStore, name: str) -> None:
    record_path(store, name).unlink(missing_ok=True)
    sync_folder(store.directory)


# --- what an interrupted command has left ---------------------------------------------------------------------


class Resumed(NamedTuple):
    """What was done with a record."""

    entry: Entry  # as it is now
    changed: bool  # whether the new passphrase counts; otherwise the one from before


def resume(store: KeyStore, name: str) -> Resumed | None:
    """Finishes or undoes the interrupted change of a key, within `KeyStore.changing`. The record stays, for `end`, if
    the change has counted: the auth token and the daemon may be those from before. None if there is no record.

    PeerError if the record is damaged; NoPassphrase if the keyring library gives none now; ModuleFailed if neither
    file can be opened by it.
    """
    record = read_record(store, name)
    if record is None:
        return None
    staged = record.staged.exists()
    if staged and (not record.ready or record.entry.source != "keyring" or not _is_new(record)):
        _undo(store, record)
        return Resumed(store.load(name), False)
    if not record.ready:
        _end(store, name)
        return Resumed(store.load(name), False)
    _commit(store, record)
    return Resumed(record.entry, True)


def end(store: KeyStore, name: str) -> None:
    """Removes the record of a change that has counted."""
    _end(store, name)


def leftovers(store: KeyStore) -> list[Leftover]:
    """Lists what interrupted commands have left in the store's folder: records, and temporary files that are older
    than a minute. OSError."""
    try:
        names = sorted(os.listdir(store.directory))  # noqa: PTH208 - names are enough
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        path = store.directory / name
        if key := _key_of_record(name):
            found.append(Leftover(key, path, f"a change of the key {key}'s passphrase was interrupted"))
        elif _TEMPORARY.fullmatch(name) and _is_stale(path):
            found.append(Leftover("", path, "a temporary file of a command that was interrupted"))
    return found


def _key_of_record(file: str) -> str:
    """Returns the name of the key whose record this file is; "" if it is none."""
    name = file.removeprefix(".").removesuffix(RECORD)
    if file != f".{name}{RECORD}":
        return ""
    try:
        check_name(name)
    except UpcallError:
        return ""
    return name


def _is_stale(path: Path) -> bool:
    try:
        return abs(time.time() - path.lstat().st_mtime) > _STALE
    except OSError:
        return False


def _is_new(record: Record) -> bool:
    """Returns whether the passphrase in the keyring library is the new file's. ModuleFailed if it opens neither."""
    passphrase = fetch_from_keyring(record.entry.signature, PATIENCE)
    try:
        if _opens(record.entry, record.staged, passphrase):
            return True
        if _opens(record.entry, record.path, passphrase):
            return False
    finally:
        wipe(passphrase)
    raise ModuleFailed(
        f"the passphrase that the keyring library keeps opens neither {record.path} nor the new {record.staged}; "
        f"`keyring set upcall {record.entry.signature}` stores the right one"
    )


def _opens(entry: Entry, path: Path, passphrase: bytearray) -> bool:
    module = plugins.load(plugins.find(entry.module).spec)
    if not isinstance(module, KeyImporter):
        raise ModuleFailed(f"the key module {entry.module!r} takes in no keys")
    try:
        return read_key(module, entry, path, passphrase, _Nothing()).signature == entry.signature
    except (ModuleFailed, Refused):
        return False


def read_key(importer: KeyImporter, entry: Entry, path: Path, passphrase: bytearray, secrets: Any) -> Enrolled:
    """Reads a key file of this entry at another path, and validates it. `passphrase`: copied. ModuleFailed, Refused,
    UsageError of the module."""
    values = values_of(importer, entry)
    own = passphrase.copy()
    try:
        return importer.import_key(Making(path, values, own, entry.source, Limits(), secrets))
    finally:
        wipe(own)


def values_of(importer: KeyImporter, entry: Entry) -> dict[str, str]:
    """Returns the values of the parameters for importing the key of an entry anew. UsageError."""
    known = {one.name for one in importer.import_parameters}
    return chosen(importer.import_parameters, {key: entry.parameters[key] for key in entry.parameters if key in known})


class _Nothing:
    """Implements `keymodule.Secrets` without any."""

    def passphrase(self, source: str, /) -> bytearray:
        raise Refused("locked")

    def pin(self, token: str, prompt: str, /) -> bytearray:
        raise Refused("locked")

    def verdict(self, token: str, good: bool, /) -> None: ...

    def touch(self, token: str, prompt: str, /) -> None: ...


# --- the record ------------------------------------------------------------------------------------------------


def record_path(store: KeyStore, name: str) -> Path:
    return store.directory / f".{name}{RECORD}"


def _text(record: Record) -> bytes:
    fields = {
        "entry": text_of(record.entry).decode(),
        "path": str(record.path),
        "staged": str(record.staged),
        "ready": record.ready,
        "leaves_keyring": record.leaves_keyring,
    }
    return json.dumps(fields, indent=1).encode()


def read_record(store: KeyStore, name: str) -> Record | None:
    """Reads the record of a key; None if there is none. PeerError if it is damaged; OSError."""
    path = record_path(store, name)
    try:
        text, _ = read_private(path, _MAX_RECORD)
    except FileNotFoundError:
        return None
    where = str(path)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise PeerError(where, "is damaged: no JSON") from None
    kinds = {"entry": str, "path": str, "staged": str, "ready": bool, "leaves_keyring": bool}
    if not isinstance(fields, dict) or {key: type(value) for key, value in fields.items()} != kinds:
        raise PeerError(where, "is damaged: its fields are not those of a record")
    entry = parse(name, fields["entry"].encode(errors="surrogatepass"), where)
    target, staged = Path(fields["path"]), Path(fields["staged"])
    if not target.is_absolute() or staged.parent != target.parent or not _TEMPORARY.fullmatch(staged.name):
        raise PeerError(where, "is damaged: its paths do not belong together")
    if staged.name.rpartition(".")[0] != f".{target.name}" or target.suffix == SUFFIX:
        raise PeerError(where, "is damaged: its paths do not belong together")
    return Record(entry, target, staged, fields["ready"], fields["leaves_keyring"])
