"""`upcall key list` and `upcall key show`; finds keys by name or signature."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import click

from upcall.cli import completing, error_text
from upcall.core.errors import PeerError, UsageError
from upcall.kernel import keyring
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.authtok import AuthTok, take_auth_tok

_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")


class Target(NamedTuple):
    """The key of a command: one of the key store, or one whose auth token another program added to the user
    keyring."""

    name: str
    module: str
    signature: str
    source: str | None
    blob: bytes | None
    entry: Entry | None

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {self.module!r}, {self.signature!r})"  # a foreign blob may contain a passphrase


def target_of(name: str) -> Target:
    """Finds a key by name or signature. UsageError if there is no such key."""
    try:
        entry = KeyStore().find(name)
    except UsageError:
        token = token_in_keyring(name)
        if token is None:
            raise
        return Target(name, token.alias, token.signature, None, token.blob, None)
    return Target(entry.name, entry.module, entry.signature, entry.source, entry.blob, entry)


def token_in_keyring(signature: str) -> AuthTok | None:
    """Returns the auth token of the private key with this signature in the user keyring; None without one."""
    keyring.ensure_user_keyring_linked()
    serial = keyring.find(signature)
    return None if serial is None else _token(serial, signature)


def foreign_tokens() -> list[AuthTok]:
    """Returns the auth tokens of private keys in the user keyring, including those of other programs."""
    keyring.ensure_user_keyring_linked()
    keys = [key for key in keyring.list_user_keyring() if key.type == "user"]
    tokens = [_token(key.serial, key.description) for key in keys]
    return [token for token in tokens if token is not None]


def _token(serial: int, description: str) -> AuthTok | None:
    try:
        token = take_auth_tok(keyring.read(serial))
    except (OSError, PeerError):
        return None  # not readable, or not an auth token: other programs use the user keyring, too
    return token if token.signature == description else None


@click.command("list", short_help="List the keys, and others' auth tokens.")
@_JSON
@click.pass_context
def list_keys(ctx: click.Context, as_json: bool) -> None:
    """List the keys, and auth tokens in the user keyring that others put there."""
    store, rows = KeyStore(), []
    names = store.names()
    for name in names:
        try:
            rows.append(_row(store.load(name)))
        except (PeerError, OSError) as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
    broken = len(names) - len(rows)
    known = {row["signature"] for row in rows}
    rows += [_foreign_row(token) for token in foreign_tokens() if token.signature not in known]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    if broken:
        ctx.exit(os.EX_DATAERR)


@click.command(short_help="Show what is known about a key; never a secret.")
@click.argument("name", shell_complete=completing.keys)
@_JSON
def show(name: str, as_json: bool) -> None:
    """Show what is known about a key, given its NAME or signature. Never a secret."""
    target = target_of(name)
    if target.entry is not None:
        row = _row(target.entry)
    else:
        row = _foreign_row(AuthTok(target.signature, target.module, b""))
    if as_json:
        click.echo(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        if key == "parameters":
            value = ", ".join(f"{name}={chosen}" for name, chosen in value.items()) or None
        if value is not None:
            told = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            click.echo(f"{key.replace('_', ' '):<14} {told}")


def mount_options(signature: str) -> str:
    return f"ecryptfs_sig={signature},ecryptfs_cipher=aes,ecryptfs_key_bytes=16"


_FIELDS = ("name", "module", "signature", "source", "description", "created", "path", "parameters", "auto")


def _row(entry: Entry) -> dict[str, Any]:
    row = {field: getattr(entry, field) for field in _FIELDS}
    row |= {"created": entry.created.isoformat(), "parameters": dict(entry.parameters)}
    row["in_keyring"] = keyring.find(entry.signature) is not None
    return {**row, "mount_options": mount_options(entry.signature)}


def _foreign_row(token: AuthTok) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_FIELDS)
    row |= {"module": token.alias, "signature": token.signature, "parameters": {}, "auto": False, "in_keyring": True}
    return {**row, "mount_options": mount_options(token.signature)}


def print_entry(entry: Entry) -> None:
    """Prints a new key, and how to use it."""
    options = mount_options(entry.signature)
    click.echo(f"signature      {entry.signature}")
    if entry.path is not None:
        click.echo(f"key file       {entry.path}")
    click.echo(f"mount options  {options}")
    click.echo(f"mount -i -t ecryptfs -o {options} LOWER UPPER")


def _print_table(rows: list[dict[str, Any]]) -> None:
    heads = ("NAME", "SIGNATURE", "MODULE", "KIND", "PASSPHRASE", "AUTO", "IN KEYRING")
    cells = [heads] + [
        (
            row["name"] or "-",
            row["signature"],
            row["module"],
            row["description"] or "-",
            row["source"] or "-",
            "yes" if row["auto"] else "no",
            "yes" if row["in_keyring"] else "no",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
