"""`upcall key backup` and `upcall key restore`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from upcall.cli import completing, error_text, exit_code, output
from upcall.cli.asking import confirm
from upcall.cli.keychange import changing
from upcall.cli.keyopen import importer_of, load
from upcall.cli.output import for_terminal
from upcall.cli.parameter_types import DESCRIPTOR
from upcall.cli.passphrases import Given, check_descriptors, passphrase_options
from upcall.cli.secrets import CliSecrets
from upcall.core.errors import ModuleFailed, UpcallError, UsageError
from upcall.keymodule import Enrolled, KeyModule, Limits, Making
from upcall.keys.backup import MAX_BACKUP, MAX_KEY_FILE, Kept, key_suffix, pack_backup, take_backup, take_header
from upcall.keys.enrolment import open_and_prove, take_in
from upcall.keys.passphrase import (
    PATIENCE,
    fetch_from_keyring,
    from_fd,
    from_file,
    from_terminal,
    store_in_keyring,
    wipe,
)
from upcall.keys.plugins import available
from upcall.keys.private_file import read_private, write_new, write_over
from upcall.keys.replacing import values_of
from upcall.keys.sharing import sharing, users_of
from upcall.keys.store import COMPAT, Entry, KeyStore, check_name

T = TypeVar("T")

_WORDS = re.compile(rb"[\x21-\x7e]{4,}")  # of a blob: where its token is

_BACKUP_FD = click.option(
    "--backup-passphrase-fd",
    type=DESCRIPTOR,
    metavar="N",
    help="Read the backup's passphrase from this descriptor.",
)
_BACKUP_FILE = click.option(
    "--backup-passphrase-file",
    type=click.Path(path_type=Path),
    help="Read the backup's passphrase from this file, which no other user may read.",
)


# --- backup ----------------------------------------------------------------------------------------------------


@click.command(short_help="Write keys to one encrypted file.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completing.keys)
@click.option("--all", "everything", is_flag=True, help="All keys.")
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The file to write, for you alone (mode 0600).",
)
@click.option("--force", is_flag=True, help="Replace FILE, if it is there.")
@_BACKUP_FD
@_BACKUP_FILE
def backup(
    names: tuple[str, ...],
    everything: bool,
    file: Path,
    force: bool,
    backup_passphrase_fd: int | None,
    backup_passphrase_file: Path | None,
) -> None:
    """Write the keys NAME, or all, to one file, which `upcall key restore` reads.

    The file is encrypted by a passphrase of its own, which is typed, twice. It has the keys' entries and key files,
    as they are: a key file with a passphrase keeps that, too. Passphrases are in it only if the keyring library keeps
    them. A key in a token or TPM cannot leave it: only what says how it is found is in the backup.

    \b
    Exit codes: 0; 64 there is no such key, or an option is wrong; 65 an entry is damaged; 66 a key file is
    missing; 69 the keyring library gives no passphrase; 73 FILE exists; 77 other users can read a key file.

    \b
    Examples:
      $ upcall key backup --all -o keys.backup
      $ upcall key backup work home -o keys.backup
    """
    if everything is bool(names):
        raise UsageError("name the keys, or give --all: one of the two")
    _check_output(file, force)
    store = KeyStore()
    with changing(store, *(store.names() if everything else names)):
        entries = {entry.name: entry for entry in (store.find(name) for name in names or store.names())}
        if not entries:
            raise UsageError(f"there is no key in {store.directory}")
        keys = [_kept(entry) for entry in entries.values()]
    secret = _backup_passphrase(
        backup_passphrase_fd, backup_passphrase_file, "New passphrase for the backup: ", "The same once more: "
    )
    try:
        data = _with_memory(lambda: pack_backup(keys, secret))
    finally:
        wipe(secret)
    (write_over if force else write_new)(file, data)
    for key in keys:
        for missing in _not_in_it(key):
            output.note(f"{key.name}: {missing}")
    output.done(f"{file}: {', '.join(entries)}")


def _check_output(file: Path, force: bool) -> None:
    """FileExistsError, OSError: a device or FIFO is never replaced."""
    if str(file) == "-":
        raise UsageError("a backup is not written to standard output: name a file (`./-` is one, too)")
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(file))
    if not force and os.path.lexists(file):
        raise FileExistsError(errno.EEXIST, "is there already: --force replaces it", str(file))


def _kept(entry: Entry) -> Kept:
    file = None
    if entry.path is not None:
        data, _ = read_private(entry.path, MAX_KEY_FILE)
        file = bytes(data)
        wipe(data)
    passphrase = None
    if entry.source == "keyring":
        secret = fetch_from_keyring(entry.signature, PATIENCE)
        passphrase = bytes(secret)
        wipe(secret)
    return Kept(entry.name, entry, file, key_suffix(entry.path), passphrase)


def _not_in_it(key: Kept) -> list[str]:
    """Returns what the backup of a key does not contain, for people."""
    source, found = key.entry.source, []
    if source.startswith("file:"):
        found.append(f"its passphrase is in {source.removeprefix('file:')}, which is not in the backup")
    elif source in ("ask", COMPAT):
        found.append("its passphrase is kept nowhere, and not in the backup: remember it, too")
    if _in_hardware(key):
        found.append("what the token or TPM holds is not in the backup: only there can the key be used")
    return found


def _in_hardware(key: Kept) -> bool:
    """Returns whether a token or TPM holds the key: it has no file, or a PIN. Then its file is of use only there."""
    try:
        module = load(key.entry.module)
    except UpcallError:
        return False
    no_passphrase = not getattr(module, "takes_passphrase", True)
    return no_passphrase and (key.file is None or getattr(module, "changes", "") == "PIN")


def _takes_passphrase(entry: Entry) -> bool:
    try:
        return bool(getattr(load(entry.module), "takes_passphrase", True))
    except UpcallError:
        return True


def _backup_passphrase(fd: int | None, file: Path | None, prompt: str, again: str | None = None) -> bytearray:
    if fd is not None and file is not None:
        raise UsageError("--backup-passphrase-file goes with no other --backup-passphrase option")
    if fd is not None:
        return from_fd(fd)
    if file is not None:
        return from_file(file)
    return from_terminal(prompt, again, "--backup-passphrase-fd or --backup-passphrase-file")


def _with_memory(work: Callable[[], T]) -> T:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return work()
    except MemoryError:
        raise ModuleFailed("there is not enough memory to derive the backup's key from its passphrase") from None
    except UnsupportedAlgorithm:
        raise ModuleFailed("the OpenSSL that cryptography was built with has no Argon2id: 3.2 or newer has") from None


# --- restore ---------------------------------------------------------------------------------------------------


@click.command(short_help="Restore keys from a backup.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--as", "new_name", metavar="NEW", help="Restore one key under another name.")
@click.option("--list", "listing", is_flag=True, help="List the keys in FILE, and restore none.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.option("--yes", is_flag=True, help="Do not ask before using tokens and TPMs that FILE names.")
@_BACKUP_FD
@_BACKUP_FILE
@passphrase_options
def restore(
    file: Path,
    names: tuple[str, ...],
    new_name: str | None,
    listing: bool,
    as_json: bool,
    yes: bool,
    backup_passphrase_fd: int | None,
    backup_passphrase_file: Path | None,
    given: Given,
) -> None:
    """Restore all keys, or those called NAME, from a file that `upcall key backup` wrote.

    The backup's passphrase is asked for, and that of each key which has one: every key is opened and proved, as a new
    one is. Key files are written to upcall's own folder, wherever they were before. A name that is in use is refused,
    unless it is that of the same key. Each key is restored completely or not at all.

    A key in a token or TPM is proved there, by the library or device that FILE names. They are shown first, and you
    are asked: use only what you know. Without a terminal, `--yes` is needed. No key is added at login until `upcall
    key auto` marks it.

    \b
    Exit codes: 0; 64 there is no such key in FILE, or an option is wrong; 65 FILE is damaged, or a passphrase is
    wrong; 66 FILE is not there; 73 a name is in use, or you have the key under another one.

    \b
    Examples:
      $ upcall key restore keys.backup --list
      $ upcall key restore keys.backup
      $ upcall key restore keys.backup work --as old-work
    """
    _check_options(names, new_name, listing, as_json)
    fds = (("--passphrase-fd", given.fd), ("--pin-fd", given.pin_fd))
    check_descriptors(("--backup-passphrase-fd", backup_passphrase_fd), *fds)
    data = _read(file)
    take_header(data, str(file))  # before a passphrase is asked for
    secret = _backup_passphrase(backup_passphrase_fd, backup_passphrase_file, "Passphrase of the backup: ")
    try:
        keys = _with_memory(lambda: take_backup(data, secret, str(file)))
    finally:
        wipe(secret)
    if listing:
        _list(keys, as_json)
        return
    chosen = _chosen(keys, names, file)
    if new_name is not None:
        chosen = [chosen[0]._replace(name=new_name, entry=chosen[0].entry._replace(name=new_name))]
    _confirm_places(chosen, yes)
    with _given_once(given) as secrets_of:
        _restore_all(chosen, secrets_of)


def _check_options(names: tuple[str, ...], new_name: str | None, listing: bool, as_json: bool) -> None:
    if new_name is not None:
        check_name(new_name)
        if len(names) != 1:
            raise UsageError("--as: name the one key to restore")
    if as_json and not listing:
        raise UsageError("--json goes with --list")
    if listing and names:
        raise UsageError("--list lists all keys of FILE")


def _read(file: Path) -> bytes:
    """Reads a backup, which others may read, too: it is encrypted. OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # opening a FIFO must not hang
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        data = stream.read(MAX_BACKUP + 1)
    if len(data) > MAX_BACKUP:
        raise OSError(errno.EFBIG, f"is larger than a backup can be, {MAX_BACKUP} bytes", str(file))
    return data


def _list(keys: list[Kept], as_json: bool) -> None:
    rows = [
        {
            "name": key.name,
            "signature": key.entry.signature,
            "module": key.entry.module,
            "description": key.entry.description,
            "source": key.entry.source,
            "created": key.entry.created.isoformat(),
            "file": key.file is not None,
            "passphrase": key.passphrase is not None,
        }
        for key in keys
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    heads = ("NAME", "SIGNATURE", "MODULE", "KIND", "PASSPHRASE", "FILE")
    fields = ("name", "signature", "module", "description", "source")
    output.table(heads, [[*(str(row[field]) for field in fields), "yes" if row["file"] else "no"] for row in rows])


def _chosen(keys: list[Kept], names: tuple[str, ...], file: Path) -> list[Kept]:
    if not names:
        return keys
    known = {key.name: key for key in keys}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no key {name!r} in {file}: {', '.join(known)} are there")
    return [known[name] for name in dict.fromkeys(names)]


def _confirm_places(keys: list[Kept], yes: bool) -> None:
    """Asks whether tokens and TPMs are to be used: a backup of another person could name any library, device or host.
    These key modules are those that recommend a process of their own."""
    modules = available()
    places = [key for key in keys if (module := modules.get(key.entry.module)) is not None and module.isolated]
    if not places or yes:
        return
    for key in places:
        words = [f"{name}={value}" for name, value in sorted(key.entry.parameters.items())]
        words += [found.decode() for found in _WORDS.findall(key.entry.blob or b"")]
        click.echo(for_terminal(" ".join((f"{key.name} ({key.entry.module}):", *words))), err=True)
    confirm("Use these libraries, devices and hosts, which the backup names?")


SecretsOf = Callable[[Kept], CliSecrets]


@contextlib.contextmanager
def _given_once(given: Given) -> Any:
    """A context with a function that returns the secrets of a key. A descriptor can be read once, for all keys."""
    word = None
    if given.fd is not None:
        word = from_fd(given.fd)
        given = given._replace(fd=None)

    def secrets_of(key: Kept) -> CliSecrets:
        kept = word if word is not None else _known_passphrase(key, given)
        return CliSecrets(given, key.name, key.entry.signature, passphrase=kept)

    try:
        yield secrets_of
    finally:
        wipe(word or bytearray())


def _known_passphrase(key: Kept, given: Given) -> bytearray | None:
    """Returns the passphrase that the backup or the file of the key's source holds; None to ask for it."""
    if given.any():
        return None
    if key.passphrase is not None:
        return bytearray(key.passphrase)
    if key.entry.source.startswith("file:"):
        return from_file(key.entry.source.removeprefix("file:"))
    return None


def _restore_all(keys: list[Kept], secrets_of: SecretsOf) -> None:
    failures: list[UpcallError | OSError] = []
    for key in keys:
        try:
            _restore(key, secrets_of)
        except (UpcallError, OSError) as error:
            if len(keys) == 1:
                raise
            failures.append(error)
            click.echo(f"upcall: {key.name} was not restored: {error_text(error)}", err=True)
    if failures:
        click.get_current_context().exit(exit_code(failures[0]))


def _restore(key: Kept, secrets_of: SecretsOf) -> None:
    """Restores one key, or leaves everything as it was. ModuleFailed, Refused, UsageError, NoPassphrase, OSError."""
    store = KeyStore()
    with changing(store, key.name):
        present = store.load(key.name) if key.name in store.names() else None
        if present is not None and _is_same(present, key):
            output.done(f"{key.name} is there already")
            return
        if present is not None and not _is_lost(present, key):
            store.check_free(key.name)
        _check_new(store, key)
    module = load(key.entry.module)
    with contextlib.closing(secrets_of(key)) as secrets:
        if key.file is None:
            _restore_entry(store, module, key, secrets)
        else:
            _restore_file(store, module, key, key.file, secrets, present)
    output.done(f"restored {key.name}; `upcall key add {key.name}` adds it")
    if key.entry.auto:
        output.note(f"`upcall key auto {key.name}` adds it at each login, as it was")


def _check_new(store: KeyStore, key: Kept) -> None:
    if same := sharing(store, key.entry).same_key:
        why = f"is the same one as {key.name}, by its signature {key.entry.signature}: nothing was restored"
        raise FileExistsError(errno.EEXIST, why, f"the key {same[0]}")


def _is_same(entry: Entry, key: Kept) -> bool:
    if (entry.module, entry.signature) != (key.entry.module, key.entry.signature):
        return False
    if entry.path is None or key.file is None:
        return entry.path is None and key.file is None
    return _holds(Path(entry.path), key.file)


def _is_lost(entry: Entry, key: Kept) -> bool:
    """Returns whether it is the same key, and its file is not there any more."""
    same = (entry.module, entry.signature) == (key.entry.module, key.entry.signature)
    return same and entry.path is not None and key.file is not None and not os.path.lexists(entry.path)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return bytes(read_private(path, MAX_KEY_FILE)[0]) == content
    except OSError:
        return False


def _restore_entry(store: KeyStore, module: KeyModule, key: Kept, secrets: CliSecrets) -> None:
    """Restores a key without a file."""
    entry = key.entry
    if entry.blob is None:
        raise ModuleFailed(f"the key {key.name} has no file and no blob: nothing says where it is")
    open_and_prove(module, Enrolled(entry.signature, entry.blob, entry.description), secrets, Limits())
    _save(store, key, entry._replace(auto=False), secrets)


def _restore_file(
    store: KeyStore, module: KeyModule, key: Kept, file: bytes, secrets: CliSecrets, lost: Entry | None
) -> None:
    """Restores a key with its file, at another place as a rule: so the key module takes it in anew. `lost`: its entry,
    if only its file is missing."""
    entry, importer = key.entry, importer_of(module, key.entry.module)
    path = _free_path(store, key, file)
    there = path.exists()  # with this content: of a command that was killed
    if not there:
        write_new(path, file)
    try:
        making = Making(path, values_of(importer, entry), bytearray(), entry.source, Limits(), secrets)
        enrolled = take_in(importer, making)
        if enrolled.signature != entry.signature:
            raise ModuleFailed(f"its file holds the key {enrolled.signature}, and its entry is for {entry.signature}")
        open_and_prove(module, enrolled, secrets, making.limits)
        source = entry.source if secrets.kept or not _takes_passphrase(entry) else "none"
        blob = None if source == COMPAT else enrolled.blob
        restored = entry._replace(path=str(path), blob=blob, source=source, own_file=True)
        _save(store, key, restored._replace(auto=lost is not None and lost.auto), secrets, lost)
    except BaseException:
        if not there and (lost is not None or str(path) not in _paths(store)):
            path.unlink(missing_ok=True)
        raise


def _paths(store: KeyStore) -> set[str | None]:
    found: set[str | None] = set()
    for name in store.names():
        with contextlib.suppress(UpcallError, OSError):
            found.add(store.load(name).path)
    return found


def _save(store: KeyStore, key: Kept, entry: Entry, secrets: CliSecrets, lost: Entry | None = None) -> None:
    """Saves the entry, in place of `lost`, and its passphrase. FileExistsError; BlockingIOError."""
    with changing(store):
        _check_new(store, key)
        if lost is None:
            store.check_free(entry.name)
        elif store.load(entry.name) != lost:
            raise BlockingIOError(errno.EAGAIN, "another command has changed it meanwhile: try again", entry.name)
        if entry.source == "keyring" and secrets.kept:
            store_in_keyring(entry.signature, secrets.kept)
        if lost is None:
            store.save(entry)
        else:
            store.replace(entry._replace(auto=lost.auto))


def _free_path(store: KeyStore, key: Kept, file: bytes) -> Path:
    """Returns a path in the store's folder for a key file. It is free, or holds this very content and is no key's.
    FileExistsError if another file is there that is no key's."""
    store.prepare()
    path, number = store.directory / (key.name + key.suffix), 1
    while os.path.lexists(path):
        if not users_of(store, path):
            if _holds(path, file):
                return path
            raise FileExistsError(errno.EEXIST, "is there already, and no key uses it: move it away", str(path))
        number += 1
        path = store.directory / f"{key.name}-{number}{key.suffix}"
    return path
