"""`upcall key`: the user's keys, in their files, in the kernel's user keyring and in the daemon."""

from __future__ import annotations

import datetime
import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from upcall import modules
from upcall.cli import error_text
from upcall.cli.passphrases import Given, passphrase_options, passphrase_to_open, passphrase_to_set
from upcall.cli.secrets import CliSecrets
from upcall.enrol import chosen
from upcall.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.kernel import keyring
from upcall.keymodule import Enrolled, KeyImporter, KeyMaker, KeyModule, Limits, Making
from upcall.keystore import COMPAT, Entry, KeyStore
from upcall.passphrase import store_in_keyring, wipe
from upcall.wire.authtok import AuthTok, pack_auth_tok, take_auth_tok

_NAME = click.argument("name", default="default")
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.group()
def command() -> None:
    """Make, add, list, show, lock and remove keys.

    A key has a name, a key file and an auth token. The auth token stands in the kernel's user keyring under the
    key's signature, and goes with the last session: after a login, `upcall key add NAME` puts it there again.
    """


# --- generate and add ------------------------------------------------------------------------------------------


@command.command()
@_NAME
@click.option("--module", "alias", default="openssl", show_default=True, help="Which key module keeps the key.")
@click.option("--bits", type=int, help="Size of the key; by default what the key module thinks best.")
@click.option("--path", type=click.Path(path_type=Path), help="The key file.  [default: beside the key's entry]")
@click.option("--no-add", is_flag=True, help="Do not put the key's auth token into the user keyring.")
@click.option("--no-passphrase", is_flag=True, help="Leave the key file unencrypted.")
@passphrase_options
def generate(
    name: str, alias: str, bits: int | None, path: Path | None, no_add: bool, no_passphrase: bool, given: Given
) -> None:
    """Make a new key called NAME, "default" if none is given.

    Without options the passphrase is typed, twice, and the daemon keeps it in memory until it ends.
    """
    store, maker = KeyStore(), _maker(alias)
    store.check_free(name)
    values = chosen(maker.parameters, {} if bits is None else {"bits": str(bits)})
    path = Path.cwd() / (path or store.directory / (name + maker.suffix))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "is there already", str(path))
    store.prepare()
    source = "none" if no_passphrase else given.source()
    secret = bytearray() if no_passphrase else passphrase_to_set(given, name)
    try:
        made = _generate(maker, Making(path, values, secret, source, Limits(), CliSecrets(given, name)))
        entry = _entry(name, alias, made, path, source)
        try:
            _save(store, entry, secret)
        except BaseException:
            path.unlink()  # nothing was encrypted with it yet
            raise
        if not no_add:
            _add(entry, made.blob, secret)
    finally:
        wipe(secret)
    _print_entry(entry)


def _generate(maker: KeyMaker, making: Making) -> Enrolled:
    """A key of 4096 bits can take ten seconds: something should move meanwhile."""
    from rich.console import Console

    with Console(stderr=True).status("Making a key ..."):
        return maker.generate(making)


@command.command()
@_NAME
@click.option("--pem", type=click.Path(path_type=Path), help="Take this key file, and call the key NAME.")
@click.option("--module", "alias", default="openssl", show_default=True, help="With --pem: the key module.")
@click.option(
    "--compat",
    is_flag=True,
    help="With --pem: put the passphrase itself into the auth token, as ecryptfs-utils does, so that ecryptfsd "
    "can use it. Careful: every process of this user can read it there.",
)
@passphrase_options
def add(name: str, pem: Path | None, alias: str, compat: bool, given: Given) -> None:
    """Put the auth token of the key NAME into the user keyring.

    With --pem a key file that exists becomes the key NAME first. A passphrase that is needed and kept nowhere is
    asked for; the daemon keeps it in memory.
    """
    store = KeyStore()
    if pem is None:
        if compat:
            raise UsageError("--compat goes with --pem")
        entry = store.find(name)
        enrolled, secret = _enrol(_importer(entry.module), entry, given)
        if enrolled.signature != entry.signature:
            wipe(secret)
            raise ModuleFailed(f"{entry.path}: holds the key {enrolled.signature}, {name} is {entry.signature}")
    else:
        entry, enrolled, secret = _take(store, name, Path.cwd() / pem, alias, compat, given)
    try:
        _add(entry, enrolled.blob, secret)
    finally:
        wipe(secret)
    _print_entry(entry)


def _take(
    store: KeyStore, name: str, path: Path, alias: str, compat: bool, given: Given
) -> tuple[Entry, Enrolled, bytearray]:
    """Makes an entry for a key file that exists."""
    if compat and given.keyring:
        raise UsageError("--compat keeps the passphrase in the auth token, not in the keyring library")
    store.check_free(name)
    source = COMPAT if compat else given.source()
    blank = _entry(name, alias, Enrolled("", b"", ""), path, source)
    enrolled, secret = _enrol(_importer(alias), blank, given)
    entry = _entry(name, alias, enrolled, path, source if secret else "none")
    try:
        _save(store, entry, secret)
    except BaseException:
        wipe(secret)
        raise
    return entry, enrolled, secret


def _save(store: KeyStore, entry: Entry, secret: bytearray) -> None:
    """The entry, once its passphrase is where the entry says."""
    if entry.source == "keyring":
        store_in_keyring(entry.signature, secret)
    store.save(entry)


def _enrol(importer: KeyImporter, entry: Entry, given: Given) -> tuple[Enrolled, bytearray]:
    """The key's blob, and its passphrase, empty if it has none. It is asked for once the file is seen to need it."""
    values = chosen(importer.import_parameters, {})
    blank = Making(Path(entry.path), values, bytearray(), entry.source, Limits(), CliSecrets(given, entry.name))
    try:
        return importer.import_key(blank), bytearray()
    except Refused:
        secret = passphrase_to_open(given, entry.name, entry.signature, entry.source)
    try:
        return importer.import_key(blank._replace(passphrase=secret)), secret
    except BaseException:
        wipe(secret)
        raise


def _add(entry: Entry, blob: bytes, secret: bytearray) -> None:
    """The auth token into the user keyring, then the passphrase to the daemon if nothing else keeps it."""
    from upcall.control import DaemonControl, NoDaemon

    token = AuthTok(entry.signature, entry.module, blob)
    keyring.add_user_key(entry.signature, pack_auth_tok(token))
    asked = entry.source == "ask"
    try:
        with DaemonControl() as daemon:
            daemon.unlock(entry.signature, secret if asked else bytearray())
    except NoDaemon as error:
        click.echo(f"upcall: note: {error}", err=True)
        again = f", and `upcall key add {entry.name}` asks for the passphrase again" if asked else ""
        click.echo(f"upcall: note: nothing is decrypted until `upcall daemon` runs{again}", err=True)


def _load(alias: str) -> KeyModule:
    available = modules.available()
    if alias not in available:
        raise UsageError(f"there is no key module {alias!r}: {', '.join(available) or 'none'} installed")
    return modules.load(available[alias].spec)


def _maker(alias: str) -> KeyMaker:
    module = _load(alias)
    if not isinstance(module, KeyMaker):
        raise UsageError(f"the key module {alias!r} makes no keys: use its own tools, then `upcall key import`")
    return module


def _importer(alias: str) -> KeyImporter:
    module = _load(alias)
    if not isinstance(module, KeyImporter):
        raise UsageError(f"the key module {alias!r} takes in no keys")
    return module


def _entry(name: str, alias: str, enrolled: Enrolled, path: Path, source: str) -> Entry:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symbolic links
    return Entry(name, alias, enrolled.signature, str(path), source, enrolled.description, now)


# --- list and show ---------------------------------------------------------------------------------------------


@command.command("list")
@_JSON
@click.pass_context
def list_keys(ctx: click.Context, as_json: bool) -> None:
    """List the keys, and auth tokens in the user keyring that others put there."""
    store, rows = KeyStore(), []
    for name in store.names():
        try:
            rows.append(_row(store.load(name)))
        except (PeerError, OSError) as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
    broken = len(store.names()) - len(rows)
    known = {row["signature"] for row in rows}
    rows += [row for row in _foreign_rows() if row["signature"] not in known]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    if broken:
        ctx.exit(os.EX_DATAERR)


@command.command()
@click.argument("name")
@_JSON
def show(name: str, as_json: bool) -> None:
    """Show what is known about a key, given its NAME or signature. Never a secret."""
    try:
        row = _row(KeyStore().find(name))
    except UsageError:
        found = [row for row in _foreign_rows() if row["signature"] == name]
        if not found:
            raise
        row = found[0]
    if as_json:
        click.echo(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        if value is not None:
            told = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            click.echo(f"{key.replace('_', ' '):<14} {told}")


def _mount_options(signature: str) -> str:
    return f"ecryptfs_sig={signature},ecryptfs_cipher=aes,ecryptfs_key_bytes=16"


def _row(entry: Entry) -> dict[str, Any]:
    told = {**entry._asdict(), "created": entry.created.isoformat()}
    told["in_keyring"] = keyring.find(entry.signature) is not None
    return {**told, "mount_options": _mount_options(entry.signature)}


def _foreign_rows() -> list[dict[str, Any]]:
    """Auth tokens of private keys in the user keyring, however they came there."""
    keyring.ensure_user_keyring_linked()
    rows = []
    for key in keyring.list_user_keyring():
        try:
            token = take_auth_tok(keyring.read(key.serial)) if key.type == "user" else None
        except (OSError, PeerError):
            continue  # not to be read, or something else: the user keyring is for everybody
        if token is not None and token.signature == key.description:
            row: dict[str, Any] = dict.fromkeys(Entry._fields)
            row |= {"module": token.alias, "signature": token.signature, "in_keyring": True}
            rows.append({**row, "mount_options": _mount_options(token.signature)})
    return rows


def _print_entry(entry: Entry) -> None:
    options = _mount_options(entry.signature)
    click.echo(f"signature      {entry.signature}")
    click.echo(f"key file       {entry.path}")
    click.echo(f"mount options  {options}")
    click.echo(f"mount -i -t ecryptfs -o {options} LOWER UPPER")


def _print_table(rows: list[dict[str, Any]]) -> None:
    heads = ("NAME", "SIGNATURE", "MODULE", "SIZE", "PASSPHRASE", "IN KEYRING")
    cells = [heads] + [
        (
            row["name"] or "-",
            row["signature"],
            row["module"],
            row["description"] or "-",
            row["source"] or "-",
            "yes" if row["in_keyring"] else "no",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# --- remove and lock -------------------------------------------------------------------------------------------


@command.command()
@click.argument("name")
@click.option("--keyring-only", is_flag=True, help="Take it out of the user keyring only; the files stay.")
@click.option("--yes", is_flag=True, help="Delete the files without asking.")
def remove(name: str, keyring_only: bool, yes: bool) -> None:
    """Take a key, given its NAME or signature, out of the user keyring and the daemon, and delete its files.

    A key file outside of upcall's own directory is never deleted.
    """
    store = KeyStore()
    try:
        entry = store.find(name)
    except UsageError:
        if keyring.find(name) is None:
            raise
        _forget(name)
        return
    _forget(entry.signature)
    if keyring_only:
        return
    files = [Path(entry.path)] if Path(entry.path).parent == store.directory else []
    if not yes:
        lost = f" What is encrypted with it is lost if there is no other copy of {files[0]}." if files else ""
        click.confirm(f"Delete the key {entry.name}?{lost}", abort=True, err=True)
    for path in files:
        path.unlink(missing_ok=True)
    store.remove(entry.name)


def _forget(signature: str) -> None:
    from upcall.control import DaemonControl, NoDaemon

    serial = keyring.find(signature)
    if serial is not None:
        keyring.unlink(serial)
    try:
        with DaemonControl() as daemon:
            daemon.lock(signature)
    except NoDaemon:
        pass  # then nobody holds it


@command.command()
@click.argument("name", required=False)
def lock(name: str | None) -> None:
    """Make the daemon forget a key and its passphrase, given its NAME or signature; all keys if none is given."""
    from upcall.control import DaemonControl

    signature = None
    if name is not None:
        try:
            signature = KeyStore().find(name).signature
        except UsageError:
            if keyring.find(name) is None:
                raise
            signature = name
    with DaemonControl() as daemon:
        count = daemon.lock(signature)
    click.echo(f"{count} {'key' if count == 1 else 'keys'} locked")
