"""`upcall key`: manages the user's keys: in key modules, the user keyring and the daemon."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from upcall.cli import completing, output
from upcall.cli.commands import Group
from upcall.cli.keybackup import backup, restore
from upcall.cli.keychange import changing, put_token
from upcall.cli.keylock import lock, unlock
from upcall.cli.keyopen import blob_of, importer_of, load, opened
from upcall.cli.keypasswd import passwd
from upcall.cli.keyremove import remove
from upcall.cli.keyrename import rename, resume
from upcall.cli.keyshow import list_keys, print_entry, show, target_of
from upcall.cli.parameters import ParameterWords, gather, parameter_options
from upcall.cli.passphrases import Given, new_passphrase_options, passphrase_options, passphrase_to_set
from upcall.cli.remedies import start_of_daemon
from upcall.cli.secrets import CliSecrets
from upcall.core.errors import UsageError
from upcall.keymodule import (
    Enrolled,
    KeyMaker,
    Limits,
    Making,
    Parameter,
    Public,
)
from upcall.keys.enrolment import open_and_prove, take_in
from upcall.keys.passphrase import store_in_keyring, wipe
from upcall.keys.replacing import leftovers
from upcall.keys.sharing import sharing, users_of
from upcall.keys.store import COMPAT, Entry, KeyStore, check_auto

_NAME = click.argument("name", default="default", shell_complete=completing.keys)
_NEW = click.argument("name", default="default")
_MODULE = click.option(
    "--module",
    "alias",
    default="openssl",
    show_default=True,
    metavar="ALIAS",
    shell_complete=completing.key_modules,
    help="The key module that uses the key.",
)
_NO_ADD = click.option("--no-add", is_flag=True, help="Do not put the key's auth token into the user keyring.")
_AUTO = click.option("--auto", is_flag=True, help="Have the daemon add the key at each login: see `upcall key auto`.")


@click.group(cls=Group)
def command() -> None:
    """Make, import, add, list, show, lock, unlock, change, back up and remove keys.

    A key has a name, a key module that holds it, and an auth token. The auth token is in the kernel's user keyring
    under the key's signature, and is gone after the last session: after a login, `upcall key add NAME` adds it
    again, or the daemon does so (`upcall key auto NAME`).
    """


for known in (list_keys, show, lock, unlock, passwd, rename, backup, restore, remove, resume):
    command.add_command(known)


# --- generate and import ---------------------------------------------------------------------------------------


@command.command(short_help="Make a new key.")
@_NEW
@_MODULE
@click.option("--bits", type=int, metavar="N", help="The same as --param bits=N.")
@click.option("--path", type=click.Path(path_type=Path), help="The key file.  [default: beside the key's entry]")
@_NO_ADD
@_AUTO
@click.option("--no-passphrase", is_flag=True, help="Leave the key file unencrypted.")
@parameter_options
@new_passphrase_options
def generate(
    name: str,
    alias: str,
    bits: int | None,
    path: Path | None,
    no_add: bool,
    auto: bool,
    no_passphrase: bool,
    told: ParameterWords,
    given: Given,
) -> None:
    """Make a new key called NAME, "default" if none is given.

    Without options you type the passphrase twice, if the key module needs one, and the daemon keeps it in memory
    until it ends. --param sets what the key module lets you choose; an unknown name lists the known ones.

    \b
    Examples:
      $ upcall key generate
      $ upcall key generate work --module x25519
      $ upcall key generate card --module pkcs11 --param 'uri=pkcs11:token=work;object=files'
    """
    store, module = KeyStore(), load(alias)
    store.check_free(name)
    if not isinstance(module, KeyMaker):
        raise UsageError(f"the key module {alias!r} makes no keys: use its own tools, then `upcall key import`")
    if bits is not None:
        told = told._replace(plain={**told.plain, "bits": str(bits)})
    values = gather(module.parameters, told)
    path = _new_path(store, module, name, alias, path)
    source, secret = _new_passphrase(module, alias, name, no_passphrase, given)
    try:
        with contextlib.closing(CliSecrets(given, name, passphrase=secret)) as secrets:
            making = Making(path, values, secret, source, Limits(), secrets)
            made = _generate(module, making)
            with _removed_if_it_fails(store, name, path if module.suffix else None):
                open_and_prove(module, made, secrets, making.limits)
                entry = _entry(name, alias, made, making, module.parameters, path if module.suffix else None)
                entry = entry._replace(auto=auto, own_file=path.parent == store.directory if module.suffix else None)
                with changing(store):
                    _save(store, entry, secret)
            if not no_add:
                _add(entry, made.blob, secret)
    finally:
        wipe(secret)
    print_entry(entry)


def _new_path(store: KeyStore, maker: KeyMaker, name: str, alias: str, path: Path | None) -> Path:
    """Returns the absolute path of the new key file; for a module without key files, a name that it may use."""
    if path is not None and not maker.suffix:
        raise UsageError(f"the key module {alias!r} has no key files: --path says nothing to it")
    path = _absolute(path or _default_path(store, name, maker.suffix))
    if os.path.lexists(path):
        used = [f", as the file of the key {name}: --path names another" for name in users_of(store, path)]
        raise FileExistsError(errno.EEXIST, f"is there already{''.join(used[:1])}", str(path))
    store.prepare()
    return path


def _default_path(store: KeyStore, name: str, suffix: str) -> Path:
    """Returns the path of a new key's file: NAME and suffix, or NAME-2 and so on: a key that was renamed keeps its
    file."""
    path, number = store.directory / (name + suffix), 1
    while suffix and os.path.lexists(path) and users_of(store, path):
        number += 1
        path = store.directory / f"{name}-{number}{suffix}"
    return path


def _new_passphrase(
    maker: KeyMaker, alias: str, name: str, no_passphrase: bool, given: Given
) -> tuple[str, bytearray]:
    """Returns the passphrase's source, and the passphrase, which the caller wipes."""
    if no_passphrase and given.any():
        raise UsageError("--no-passphrase goes with no other passphrase option")
    if not maker.takes_passphrase and given.any():
        raise UsageError(f"the keys of {alias!r} have no passphrase of ours")
    if no_passphrase or not maker.takes_passphrase:
        return "none", bytearray()
    return given.source(), passphrase_to_set(given, name)


def _generate(maker: KeyMaker, making: Making) -> Enrolled:
    """Generates a key with a progress display, because RSA-4096 can take ten seconds. Not while a PIN may be typed."""
    from rich.console import Console

    if not maker.takes_passphrase:
        return maker.generate(making)
    with Console(stderr=True).status("Making a key ..."):
        return maker.generate(making)


@contextlib.contextmanager
def _removed_if_it_fails(store: KeyStore, name: str, path: Path | None) -> Iterator[None]:
    """A context that removes a new key file on failure: nothing was encrypted with it yet. Keeps it if the key's entry
    was saved already, before Ctrl-C."""
    try:
        yield
    except BaseException:
        if path is not None and name not in store.names():
            path.unlink(missing_ok=True)
        raise


@command.command("import", short_help="Enrol an existing key.")
@click.argument("name")
@_MODULE
@click.option(
    "--file", "path", type=click.Path(path_type=Path), help="The key file, if there is one. It stays in place."
)
@click.option(
    "--compat",
    is_flag=True,
    help="Put the passphrase itself into the auth token, as ecryptfs-utils does, so that ecryptfsd can use it. "
    "Careful: every process of this user can read it there.",
)
@_NO_ADD
@_AUTO
@parameter_options
@new_passphrase_options
def import_key(
    name: str,
    alias: str,
    path: Path | None,
    compat: bool,
    no_add: bool,
    auto: bool,
    told: ParameterWords,
    given: Given,
) -> None:
    """Enrol an existing key, from a file or from where the key module finds it, under the name NAME.

    A passphrase is asked for only if the key has one. A key that you have already, by its file or its signature, is
    refused, and so is a file that others can read.

    \b
    Exit codes: 0; 64 an option is missing or wrong; 65 it is no usable key, or the passphrase is wrong; 66 there is no
    such file; 73 the name is in use, or another of your keys is the same one; 77 others can read the file.

    \b
    Examples:
      $ upcall key import old --file ~/.ecryptfs/pki/openssl/key.pem
    """
    store, module = KeyStore(), load(alias)
    store.check_free(name)
    importer = importer_of(module, alias)
    if compat and given.keyring:
        raise UsageError("--compat keeps the passphrase in the auth token, not in the keyring library")
    if compat and auto:
        check_auto(COMPAT)
    path = None if path is None else _absolute(path)
    if path is not None and (used := users_of(store, path)):
        raise FileExistsError(
            errno.EEXIST, f"is the file of the key {used[0]} already: nothing was imported", str(path)
        )
    values = gather(importer.import_parameters, told)
    with contextlib.closing(CliSecrets(given, name)) as secrets:
        source = COMPAT if compat else given.source()
        making = Making(path or Path(), values, bytearray(), source, Limits(), secrets)
        enrolled = take_in(importer, making)
        open_and_prove(module, enrolled, secrets, making.limits)
        secret = secrets.kept or bytearray()
        making = making if secret else making._replace(source="none")
        entry = _entry(name, alias, enrolled, making, importer.import_parameters, path)
        entry = entry._replace(auto=auto, own_file=None if path is None else False)
        with changing(store):
            if same := sharing(store, entry).same_key:
                why = f"is the same one, by its signature {entry.signature}: nothing was imported"
                raise FileExistsError(errno.EEXIST, why, f"the key {same[0]}")
            _save(store, entry, secret)
        if not no_add:
            _add(entry, enrolled.blob, secret)
    print_entry(entry)


def _save(store: KeyStore, entry: Entry, secret: bytearray) -> None:
    """Stores the passphrase at its source, then saves the entry. FileExistsError before either."""
    store.check_free(entry.name)
    if entry.source == "keyring":
        store_in_keyring(entry.signature, secret)
        _warn_of_forgetting(entry.signature)
    store.save(entry)


def _warn_of_forgetting(signature: str) -> None:
    from upcall.keys.keyring_choice import chosen

    choice = chosen()
    if choice.lasting is False:
        click.echo(f"upcall: note: remember the passphrase! {choice.backend}: {choice.why}", err=True)
        click.echo(f"upcall: note: `keyring set upcall {signature}` stores it again", err=True)


def _entry(
    name: str,
    alias: str,
    enrolled: Enrolled,
    making: Making,
    parameters: tuple[Parameter, ...],
    path: Path | None,
) -> Entry:
    open_ones = {one.name for one in parameters if not one.secret}
    return Entry(
        name,
        alias,
        enrolled.signature,
        making.source,
        enrolled.description,
        datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        None if path is None else str(path),
        None if making.source == COMPAT else enrolled.blob,
        {key: value for key, value in making.values.items() if key in open_ones},
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symbolic links


# --- add ---------------------------------------------------------------------------------------------------------


@command.command(short_help="Put a key's auth token into the user keyring.")
@_NAME
@_AUTO
@passphrase_options
def add(name: str, auto: bool, given: Given) -> None:
    """Put the auth token of the key NAME into the user keyring, after a login, and unlock the key.

    If the passphrase is not stored, it is asked for, and the daemon keeps it in memory. The key is tested before
    anything is changed.

    \b
    Examples:
      $ upcall key add work
    """
    store = KeyStore()
    entry = store.find(name)
    if leftovers(store):
        with changing(store, entry.name):
            entry = store.load(entry.name)
    if auto:
        check_auto(entry.source)
    module = load(entry.module)
    with contextlib.closing(CliSecrets(given, entry.name, entry.signature)) as secrets:
        blob = blob_of(entry, module, secrets)
        open_and_prove(module, Enrolled(entry.signature, blob, entry.description), secrets, Limits())
        _add(entry, blob, secrets.kept or bytearray())
    if auto and not entry.auto:
        with changing(store, entry.name):
            store.replace(store.load(entry.name)._replace(auto=True))
    print_entry(entry)


def _add(entry: Entry, blob: bytes, secret: bytearray) -> None:
    """Adds the auth token to the user keyring. Then sends the passphrase to the daemon, if it is stored nowhere
    else."""
    from upcall.process.control import DaemonControl, NoDaemon

    put_token(entry, blob)
    asked = entry.source == "ask"
    try:
        with DaemonControl() as daemon:
            daemon.unlock(entry.signature, secret if asked else bytearray())
    except NoDaemon as error:
        output.note(f"{error}")
        again = f", and `upcall key unlock {entry.name}` asks for the passphrase again" if asked else ""
        output.note(f"nothing is decrypted without a daemon: start it: {start_of_daemon()}{again}")


@command.command(short_help="Have the daemon add a key whenever it starts.")
@click.argument("name", shell_complete=completing.keys)
@click.option("--off", is_flag=True, help="Turn this off. The auth token in the user keyring stays.")
def auto(name: str, off: bool) -> None:
    """Make the daemon add a key, given its NAME or signature, at each start, that is, at each login.

    The daemon does not prompt then. A passphrase that is not stored is asked for when the key is first needed, in one
    of the ways of `upcall prompt`.

    \b
    Examples:
      $ upcall key auto work
      $ upcall key auto work --off
    """
    store = KeyStore()
    entry = store.find(name)
    if not off:
        check_auto(entry.source)
    if entry.auto is off:
        with changing(store, entry.name):
            store.replace(store.load(entry.name)._replace(auto=not off))
    click.echo(f"{entry.name} is {'not ' if off else ''}added when the daemon starts")


# --- export ---------------------------------------------------------------------------------------------------------


@command.command("export-public", short_help="Write the public half of a key, as PEM.")
@_NAME
@passphrase_options
def export_public(name: str, given: Given) -> None:
    """Write the public half of a key, given its NAME or signature, to standard output, as PEM.

    \b
    Examples:
      $ upcall key export-public work > work.pem
    """
    target = target_of(name)
    with (
        contextlib.closing(CliSecrets(given, target.name, target.signature)) as secrets,
        opened(target, secrets) as handle,
    ):
        if not isinstance(handle, Public):
            raise UsageError(f"the keys of {target.module!r} have no public half")
        pem = handle.export_public()
    sys.stdout.buffer.write(pem)
