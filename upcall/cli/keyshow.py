"""`upcall key list` and `upcall key show`; finds keys by name or signature."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import click

from upcall.cli import completing, error_text, output
from upcall.cli.keystate import Daemon, KeyState, ask_daemon, state_of
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
    """List your keys, and the auth tokens that other programs added to your user keyring.

    STATE is one of: open; ready (the next request opens it); locked, since when and by what; passphrase missing (the
    next request asks for it); not added (to the user keyring: `upcall key add`); no daemon.

    \b
    Exit codes: 0 listed; 65 an entry could not be read.

    \b
    Examples:
      $ upcall key list
      $ upcall key list --json
    """
    store, rows, daemon = KeyStore(), [], ask_daemon()
    names = store.names()
    for name in names:
        try:
            rows.append(_row(store.load(name), daemon))
        except (PeerError, OSError) as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
    broken = len(names) - len(rows)
    known = {row["signature"] for row in rows}
    rows += [_foreign_row(token, daemon) for token in foreign_tokens() if token.signature not in known]
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
    """Show what is known about a key, given its NAME or signature. Never a secret.

    `state` is as in `upcall key list`.

    \b
    Exit codes: 0 shown; 64 there is no such key.

    \b
    Examples:
      $ upcall key show work
    """
    target, daemon = target_of(name), ask_daemon()
    if target.entry is not None:
        row = _row(target.entry, daemon)
    else:
        row = _foreign_row(AuthTok(target.signature, target.module, b""), daemon)
    if as_json:
        click.echo(json.dumps(row, indent=2))
        return
    row["state"] = in_words(row)
    del row["locked"]
    for key, value in row.items():
        if key == "parameters":
            value = ", ".join(f"{name}={chosen}" for name, chosen in value.items()) or None
        if value is not None:
            told = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            click.echo(f"{key.replace('_', ' '):<14} {told}")


def mount_options(signature: str) -> str:
    return f"ecryptfs_sig={signature},ecryptfs_cipher=aes,ecryptfs_key_bytes=16"


_FIELDS = ("name", "module", "signature", "source", "description", "created", "path", "parameters", "auto")


def in_words(row: dict[str, Any]) -> str:
    """Returns the state of a row for people."""
    locked = row["locked"] or {"cause": "", "since": None}
    return str(KeyState(row["state"], locked["cause"], locked["since"] or 0.0))


def row_of(entry: Entry, daemon: Daemon | None) -> dict[str, Any]:
    """Returns what `upcall status` shows of a key, as plain data. `daemon`: its status."""
    state = state_of(entry.signature, entry.source, daemon)
    return {"name": entry.name, "signature": entry.signature, **state.as_json()}


def _row(entry: Entry, daemon: Daemon | None) -> dict[str, Any]:
    row = {field: getattr(entry, field) for field in _FIELDS}
    row |= {"created": entry.created.isoformat(), "parameters": dict(entry.parameters)}
    row["in_keyring"] = keyring.find(entry.signature) is not None
    row |= state_of(entry.signature, entry.source, daemon).as_json()
    return {**row, "mount_options": mount_options(entry.signature)}


def _foreign_row(token: AuthTok, daemon: Daemon | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_FIELDS)
    row |= {"module": token.alias, "signature": token.signature, "parameters": {}, "auto": False, "in_keyring": True}
    row |= state_of(token.signature, None, daemon).as_json()
    return {**row, "mount_options": mount_options(token.signature)}


def print_entry(entry: Entry) -> None:
    """Prints a new key, and how to use it. Not with --quiet."""
    options = mount_options(entry.signature)
    output.done(f"signature      {entry.signature}")
    if entry.path is not None:
        output.done(f"key file       {entry.path}")
    output.done(f"mount options  {options}")
    output.done(f"mount -i -t ecryptfs -o {options} LOWER UPPER")


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        output.note("there are no keys: `upcall key generate` makes one")
        return
    others = [output.Column(head, optional=True) for head in ("MODULE", "KIND", "PASSPHRASE", "AUTO")]
    columns: list[output.Column | str] = ["NAME", "SIGNATURE", "STATE", *others]
    cells = [
        (
            row["name"] or "-",
            row["signature"],
            in_words(row),
            row["module"],
            row["description"] or "-",
            row["source"] or "-",
            "yes" if row["auto"] else "no",
        )
        for row in rows
    ]
    output.table(columns, cells)
