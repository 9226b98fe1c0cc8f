"""`upcall key passwd`."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import click

from upcall.cli import completing, output
from upcall.cli.keychange import changing, forget_passphrase, put_token
from upcall.cli.keyopen import blob_of, importer_of, load
from upcall.cli.output import for_terminal
from upcall.cli.parameter_types import DESCRIPTOR
from upcall.cli.passphrases import Given, check_descriptors, passphrase_options
from upcall.cli.secrets import CliSecrets
from upcall.core.errors import ModuleFailed, Refused, UpcallError, UsageError
from upcall.kernel import keyring
from upcall.keymodule import Changing, KeyMaker, KeyModule, PassphraseChanger
from upcall.keys.passphrase import from_fd, from_file, from_terminal, store_in_keyring, wipe
from upcall.keys.replacing import Replacement, read_key
from upcall.keys.sharing import sharing
from upcall.keys.store import COMPAT, Entry, KeyStore

_PLACES = ("ask", "keyring")


@click.command(short_help="Change the passphrase or PIN of a key.")
@click.argument("name", shell_complete=completing.keys)
@click.option("--new-fd", type=DESCRIPTOR, metavar="N", help="Read the new one from this descriptor.")
@click.option(
    "--new-file",
    type=click.Path(path_type=Path),
    help="Read the new one from this file, which no other user may read. The daemon will read it there, too.",
)
@click.option(
    "--keep-in",
    type=click.Choice(_PLACES),
    help="Where the daemon gets the new passphrase: from you, or from the keyring library.  [default: as before]",
)
@click.option("--no-passphrase", is_flag=True, help="Leave the key file unencrypted from now on.")
@passphrase_options
def passwd(
    name: str, new_fd: int | None, new_file: Path | None, keep_in: str | None, no_passphrase: bool, given: Given
) -> None:
    """Change the passphrase of the key NAME, or the PIN of its token.

    Without options the present and the new one are typed. The key stays the same: its signature, and the files that
    it opens. Its file is replaced at once, with the old one intact until then; a daemon that runs forgets the old
    passphrase and gets the new one. Copies and backups of the key file keep the old passphrase.

    A key that is derived from its passphrase cannot have another one: make a new key, and rewrap the files to it.

    \b
    Exit codes: 0; 64 there is no such key, it cannot be changed, or an option is wrong; 65 the present passphrase is
    wrong; 66 a file is missing; 69 the keyring library gives or takes no passphrase; 75 another command is changing
    the keys.

    \b
    Examples:
      $ upcall key passwd work
      $ upcall key passwd work --passphrase-file old --new-file new
      $ upcall key passwd card --pin-file old --new-file new
    """
    if sum((new_fd is not None, new_file is not None, no_passphrase)) > 1:
        raise UsageError("--new-fd, --new-file and --no-passphrase: only one of them")
    check_descriptors(("--passphrase-fd", given.fd), ("--pin-fd", given.pin_fd), ("--new-fd", new_fd))
    store = KeyStore()
    entry = store.find(name)
    with changing(store, entry.name):
        entry = store.load(entry.name)  # as it is after an interrupted command was resumed
    module = load(entry.module)
    if not isinstance(module, PassphraseChanger):
        raise UsageError(_cannot(entry))
    takes = isinstance(module, KeyMaker) and module.takes_passphrase
    if not takes and (keep_in is not None or no_passphrase):
        raise UsageError(f"the keys of {entry.module!r} have a {module.changes}, and no passphrase of ours")
    source = _source(entry, new_file, keep_in, no_passphrase) if takes else entry.source
    if entry.path is not None and (shared := sharing(store, entry).same_file):
        raise UsageError(f"{entry.path} is also the file of the key {shared[0]}: remove one of the two entries first")
    with contextlib.closing(CliSecrets(given, entry.name, entry.signature)) as secrets:
        blob = blob_of(entry, module, secrets)
        _check_present(entry, module, blob, secrets)
        new = _New(module.changes, entry.name)
        try:
            if not no_passphrase:
                new.read(new_fd, new_file)
            with changing(store, entry.name):
                if store.load(entry.name) != entry:
                    raise BlockingIOError(
                        errno.EAGAIN, "another command has changed it meanwhile: try again", entry.name
                    )
                _change(store, entry, source, module, blob, secrets, new)
        finally:
            wipe(new.secret)
    output.done(f"the {module.changes} of {entry.name} is another one now")


def _cannot(entry: Entry) -> str:
    name = entry.name
    return (
        f"the key module {entry.module!r} cannot change what protects the key {name}: make another key "
        f"(`upcall key generate NEW --module {entry.module}`), and have your files use that one "
        f"(`upcall ecryptfs rewrap -r FOLDER --to NEW`)"
    )


def _source(entry: Entry, new_file: Path | None, keep_in: str | None, no_passphrase: bool) -> str:
    """Returns where the new passphrase will be kept. UsageError."""
    if no_passphrase:
        if keep_in is not None:
            raise UsageError("--no-passphrase: --keep-in says where a passphrase is kept")
        return "none"
    if keep_in is not None:
        return keep_in
    if entry.source == COMPAT:
        return COMPAT
    if new_file is not None:
        return f"file:{os.path.abspath(new_file)}"  # noqa: PTH100 - resolve() follows links
    if entry.source.startswith("file:"):
        file = entry.source.removeprefix("file:")
        raise UsageError(
            f"the passphrase of {entry.name} is in {file}, which stays as it is: put the new one into another file "
            "and name that by --new-file, or keep it elsewhere by --keep-in"
        )
    return entry.source if entry.source in _PLACES else "ask"


def _check_present(entry: Entry, module: KeyModule, blob: bytes, secrets: CliSecrets) -> None:
    """Opens the key with its present passphrase, before the new one is asked for. ModuleFailed, Refused."""
    handle = module.open(entry.signature, blob, secrets)
    with contextlib.suppress(AttributeError):
        handle.close()  # type: ignore[attr-defined] # an optional member


def _change(
    store: KeyStore,
    entry: Entry,
    source: str,
    module: PassphraseChanger,
    blob: bytes,
    secrets: CliSecrets,
    new: _New,
) -> None:
    secret = new.secret
    if entry.path is None:
        changing_ = Changing(Path(), secret, source, secrets)
        changed = entry._replace(blob=module.change_passphrase(entry.signature, blob, changing_))
        if changed != entry:
            store.replace(changed)
        _spread(changed, changed.blob or b"", secret)
        return
    importer = importer_of(load(entry.module), entry.module)
    replacement = Replacement(store, entry)
    leaves_keyring = entry.source == "keyring" and source != "keyring"
    replacement.begin()
    try:
        changing_ = Changing(replacement.staged, secret, source, secrets)
        new_blob = module.change_passphrase(entry.signature, blob, changing_)
        changed = entry._replace(source=source, blob=None if source == COMPAT else new_blob)
        proved = read_key(importer, changed, replacement.staged, secret, new)
        if proved.signature != entry.signature:
            raise ModuleFailed(f"{replacement.staged}: the new file holds another key, {proved.signature}")
        replacement.ready(changed, leaves_keyring)
        if source == "keyring":
            store_in_keyring(entry.signature, secret)
    except BaseException:
        _undo(replacement, entry, source, secrets)
        raise
    replacement.commit()
    _spread(changed, new_blob, secret)
    replacement.end()


def _undo(replacement: Replacement, entry: Entry, source: str, secrets: CliSecrets) -> None:
    """Undoes a change that has failed. The keyring library may have stored the new passphrase nevertheless."""
    if source == "keyring" and entry.source == "keyring" and secrets.kept:
        with contextlib.suppress(UpcallError, OSError):
            store_in_keyring(entry.signature, secrets.kept)
    replacement.undo()


def _spread(entry: Entry, blob: bytes, secret: bytearray) -> None:
    """Brings auth token and daemon up to date."""
    keyring.ensure_user_keyring_linked()
    if keyring.find(entry.signature) is not None:
        put_token(entry, blob)
    forget_passphrase(entry, secret)


class _New:
    """The new passphrase or PIN. Implements `keymodule.Secrets` with it, to prove the new file."""

    def __init__(self, what: str, name: str) -> None:
        self._what, self._name = what, name
        self.secret = bytearray()  # empty: none

    def read(self, fd: int | None, file: Path | None) -> None:
        """Obtains it as the options specify, otherwise by typing it twice. UsageError, OSError."""
        if fd is not None:
            self.secret = from_fd(fd)
        elif file is not None:
            self.secret = from_file(file)
        else:
            prompt = f"New {self._what} for the key {self._name}: "
            self.secret = from_terminal(prompt, "The same once more: ", "--new-fd or --new-file")

    def passphrase(self, source: str, /) -> bytearray:
        return self.secret.copy()

    def pin(self, token: str, prompt: str, /) -> bytearray:
        return self.secret.copy()

    def verdict(self, token: str, good: bool, /) -> None:
        if not good:
            raise Refused("pin-refused")

    def touch(self, token: str, prompt: str, /) -> None:
        click.echo(f"upcall: {for_terminal(prompt)}", err=True)
