"""Checks the keys that this user has enrolled: their files, auth tokens and key modules."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from upcall import config
from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.kernel import keyring
from upcall.keys import plugins as modules
from upcall.keys.replacing import leftovers
from upcall.keys.store import COMPAT, SUFFIX, Entry, KeyStore
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.protocols.ecryptfs.authtok import AuthTok, take_auth_tok
from upcall.protocols.ecryptfs.own_files import WHY, OwnMounts
from upcall.protocols.ecryptfs.packets import is_signature

_FILE = "file:"  # prefix of the path of a passphrase's file


def files(scene: Scene) -> Iterator[Finding]:
    """Checks the store, its entries, and the key files that they name: existing, valid, private."""
    store = KeyStore()
    if not store.directory.exists():
        yield note("no key was made or imported yet", "to make one", "upcall key generate")
        return
    found = [*_private(store.directory, "the folder of your keys")]
    mounts = OwnMounts(keyring, scene.at("/proc/self/mountinfo"))
    for name in store.names():
        found += _entry(store, name, mounts)
    found += _leftovers(store)
    yield from found or [ok(f"{len(store.names())} keys in {store.directory}, and their files are private")]


def _leftovers(store: KeyStore) -> Iterator[Finding]:
    """Checks for what interrupted commands have left: records, temporary files, and key files that no key uses."""
    for left in leftovers(store):
        remedy = "finish or undo it" if left.name else "remove it"
        yield problem(f"{left.what}: {left.path}", remedy, "upcall key resume")
    entries = []
    for name in store.names():
        try:
            entries.append(store.load(name))
        except (UpcallError, OSError):
            return  # reported by `_entry`; it may use any file
    used = {entry.path for entry in entries}
    for path in sorted(store.directory.iterdir()):
        if path.suffix != SUFFIX and not path.name.startswith(".") and str(path) not in used and path.is_file():
            remedy = "repeat the command that was to make it, or import it (upcall key import), or delete it"
            yield note(f"no key uses {path}", remedy)


def _entry(store: KeyStore, name: str, mounts: OwnMounts) -> Iterator[Finding]:
    path = store.directory / (name + SUFFIX)
    faults = [*_private(path, f"what is known of key {name}")]
    yield from faults
    if faults:
        return
    try:
        entry = store.load(name)
    except (UsageError, PeerError, OSError) as error:
        yield problem(f"key {name}: {_text(error)}", "import the key again: see `upcall key import`")
        return
    if entry.path is not None:
        yield from _private(Path(entry.path), f"the file of key {name}")
        yield from _openable(Path(entry.path), f"the file of key {name}", mounts)
    if entry.source.startswith(_FILE):
        word = Path(entry.source.removeprefix(_FILE))
        yield from _private(word, f"the passphrase of key {name}", _LOST_WORD)
        yield from _openable(word, f"the passphrase of key {name}", mounts)


def _openable(path: Path, what: str, mounts: OwnMounts) -> Iterator[Finding]:
    """Checks that opening the file does not need an answer of the daemon itself (self-deadlock)."""
    needs = mounts.key_of(str(path))
    if needs is not None:
        remedy = "copy it to where no such key is needed, and import the copy: see `upcall key import`"
        yield problem(f"{what}, {path}, {WHY}: it needs the key {needs}", remedy)


_LOST_FILE = "bring it back from your backup (upcall key restore), or forget the key (upcall key remove)"
_LOST_WORD = "put it there again, with mode 0600: without it, no process can open the key"


def _private(path: Path, what: str, lost: str = _LOST_FILE) -> Iterator[Finding]:
    """Checks that the file is there, and that only this user can access it. `lost`: what to do if it is not there."""
    where, shown = quote(str(path)), f"{what}, {path},"
    try:
        found = path.stat()
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        remedy = lost if gone else ""
        yield problem(f"{shown} {'is not there' if gone else error.strerror}", remedy)
        return
    forbidden, mode = (0o022, "0700") if stat.S_ISDIR(found.st_mode) else (0o077, "0600")
    if found.st_uid not in (0, os.geteuid()):
        yield problem(f"{shown} belongs to uid {found.st_uid}", "as root", f"chown {os.geteuid()} {where}")
    elif found.st_mode & forbidden:
        bits = stat.S_IMODE(found.st_mode)
        yield problem(f"{shown} has mode {bits:04o}: others can get at it", "", f"chmod {mode} {where}")
    elif not os.access(path, os.R_OK):
        yield problem(f"{shown} cannot be read", "", f"chmod u+r {where}")


def tokens(scene: Scene) -> Iterator[Finding]:
    """Checks that each key has an auth token in the user keyring, and each auth token an allowed key module."""
    found, installed, allowed = _tokens(), modules.available(), config.load()
    store, faulty = KeyStore(), False
    for name in store.names():
        try:
            entry = store.load(name)
        except (UpcallError, OSError):
            continue  # reported by `files`
        if entry.signature not in found:
            faulty = True
            yield _missing(entry)
    for signature, token in found.items():
        if isinstance(token, str):
            yield problem(f"the auth token {signature} is none: {token}", "", f"upcall key remove {signature}")
        elif token.alias not in installed:
            what = f"the key module {token.alias!r} of auth token {signature} is not installed"
            yield problem(what, f"{', '.join(sorted(installed)) or 'none'} are; install the plugin that has it")
        elif not allowed.allows(token.alias):
            yield problem(allowed.refusal(token.alias), "name it there, and restart the daemon")
        else:
            continue
        faulty = True
    if not faulty:
        yield ok(f"{len(found)} auth tokens are there, and their key modules")


def _missing(entry: Entry) -> Finding:
    what = f"the key {entry.name} has no auth token in the user keyring: nothing asks for it"
    command = f"upcall key add {quote(entry.name)}"
    if entry.auto:
        return problem(f"{what}, although it is marked auto", "add it", command)
    how = "with its passphrase" if entry.source == COMPAT else "or have the daemon do it (upcall key auto)"
    return note(what, f"after each login, add it, {how}", command)


def _tokens() -> dict[str, AuthTok | str]:
    """Returns by signature the auth tokens in the user keyring, or why one is malformed."""
    keyring.ensure_user_keyring_linked()
    found: dict[str, AuthTok | str] = {}
    for key in keyring.list_user_keyring():
        if key.type != "user" or not is_signature(key.description):
            continue
        try:
            found[key.description] = take_auth_tok(keyring.read(key.serial))
        except PeerError as error:
            if error.why.startswith("token type"):
                continue  # eCryptfs's own passphrase token, which needs no daemon
            found[key.description] = str(error)
        except OSError as error:
            found[key.description] = f"it cannot be read: {error.strerror}"
    return found


def _text(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
