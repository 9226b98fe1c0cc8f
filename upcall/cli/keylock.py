"""`upcall key lock` and `upcall key unlock`, also available as `upcall lock` and `upcall unlock`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click

from upcall.cli import completing, output
from upcall.cli.keyopen import opened
from upcall.cli.keyshow import Target, target_of
from upcall.cli.passphrases import Given, passphrase_options
from upcall.cli.secrets import CliSecrets
from upcall.core.errors import UsageError
from upcall.kernel import keyring
from upcall.keys.passphrase import NoTerminal, from_file, wipe
from upcall.keys.store import KeyStore
from upcall.protocols.ecryptfs.lock_cause import since
from upcall.protocols.ecryptfs.locks import COMMAND

_FILE = "file:"  # prefix of the path of a passphrase's file
_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")


@click.command(short_help="Make the daemon forget keys and their passphrases.")
@click.argument("name", required=False, shell_complete=completing.keys)
@_JSON
def lock(name: str | None, as_json: bool) -> None:
    """Make the daemon forget a key and its passphrase, given its NAME or signature; all keys if none is given.

    Requests for them are refused, without a prompt, until `upcall unlock`. PINs are forgotten in any case.

    \b
    Exit codes: 0; 64 there is no such key; 69 there is no daemon, and so nothing to lock.

    \b
    Examples:
      $ upcall lock
      $ upcall lock work
    """
    from upcall.process.control import DaemonControl

    signature = None if name is None else target_of(name).signature
    with DaemonControl() as daemon:
        before = _locked_since(daemon.status(), signature)
        count = daemon.lock(signature)
    if as_json:
        click.echo(json.dumps({"all": signature is None, "signature": signature, "forgotten": count}))
        return
    locked = "all keys are locked" if name is None else f"{name} is locked"
    output.done(f"{locked} already, {since(before)}" if before else locked)


def _locked_since(status: dict[str, Any], signature: str | None) -> float:
    """Returns since when `upcall lock` has locked this key, or all (None), in seconds since the epoch; 0.0: it has
    not."""
    for one in status.get("locks", ()):
        if one["cause"] == COMMAND and one["signature"] == signature and not one.get("unlocked"):
            return float(one["since"])
    return 0.0


@click.command(short_help="Let the daemon use keys again.")
@click.argument("name", required=False, shell_complete=completing.keys)
@_JSON
@passphrase_options
def unlock(name: str | None, as_json: bool, given: Given) -> None:
    """Let the daemon use a key again, given its NAME or signature; all keys in the user keyring if none is given.

    If the passphrase is not stored, it is asked for, tried, and passed to the daemon, even if the key is not locked. A
    passphrase that is given is tried in any case. A file in which the passphrase is stored must be there. The user
    keyring is not changed: see `upcall key add`.

    \b
    Exit codes: 0; 64 there is no such key; 65 a passphrase does not open it; 66 the file with its passphrase is not
    there; 69 there is no daemon; 77 that file cannot be read, or other users can.

    \b
    Examples:
      $ upcall unlock
      $ upcall unlock work
    """
    from upcall.process.control import DaemonControl

    if name is None and (given.any() or given.any_pin()):
        raise UsageError("NAME is required with a passphrase or PIN option")
    with DaemonControl() as daemon:
        targets = [_known_to_the_kernel(name)] if name is not None else _all_known()
        unlocked: list[str] = []
        handed_over = 0
        missing: list[OSError | NoTerminal] = []
        for target in targets:
            with contextlib.closing(CliSecrets(given, target.name, target.signature)) as secrets:
                if target.source in ("ask", None) or given.any():
                    try:
                        with opened(target, secrets):
                            pass
                    except NoTerminal as error:
                        if name is not None:
                            raise
                        missing.append(NoTerminal(_without_terminal(error, target.name)))
                        continue
                elif target.source.startswith(_FILE):
                    try:
                        wipe(from_file(target.source.removeprefix(_FILE)))
                    except OSError as error:  # the daemon could not read it either; others are unlocked first
                        missing.append(error)
                        continue
                handed_over += secrets.kept is not None
                if daemon.unlock(target.signature, secrets.kept or bytearray()):
                    unlocked.append(target.signature)
        others = name is None and not missing and daemon.unlock_all()  # locks of keys that are not added now
    if missing:
        raise missing[0]
    if as_json:
        click.echo(json.dumps({"all": name is None, "unlocked": unlocked}))
    elif unlocked or others:
        output.done("all keys are unlocked" if name is None else f"{name} is unlocked")
    elif not targets:
        output.done("no key is in the user keyring: `upcall key add NAME` adds one")
    else:
        kept = f"; the daemon has {_counted(handed_over, 'now', 'passphrase', 'passphrases')}" if handed_over else ""
        output.done(f"no key was locked{kept}" if name is None else f"{name} was not locked{kept}")


def _without_terminal(error: NoTerminal, name: str) -> str:
    asked = str(error).partition(": use ")[0]
    return f"{asked}: use `upcall unlock {name} --passphrase-file FILE`"


def _counted(count: int, what: str, one: str = "key", several: str = "keys") -> str:
    return f"{count} {one if count == 1 else several} {what}"


def _known_to_the_kernel(name: str) -> Target:
    target = target_of(name)
    if keyring.find(target.signature) is None:
        raise UsageError(f"the key {name} is not in the user keyring: use `upcall key add {name}`")
    return target


def _all_known() -> list[Target]:
    targets = [target_of(name) for name in KeyStore().names()]
    return [target for target in targets if keyring.find(target.signature) is not None]
