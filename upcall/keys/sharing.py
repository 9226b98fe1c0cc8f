"""Finds keys of the store that have a file or a signature in common, so that none loses what another one needs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from upcall.core.errors import UpcallError
from upcall.keys.store import Entry, KeyStore


class Sharing(NamedTuple):
    """What other entries have in common with one: their names, sorted."""

    same_key: tuple[str, ...]  # the same signature: they share the auth token, and what the daemon has opened
    same_file: tuple[str, ...]  # the same key file, by path or inode, or the same signature and any file
    unknown: tuple[str, ...]  # entries that cannot be read


def sharing(store: KeyStore, entry: Entry) -> Sharing:
    """Compares an entry, which need not be saved yet, with all others. OSError if the store cannot be read."""
    same_key, same_file, unknown = [], [], []
    for name in store.names():
        if name == entry.name:
            continue
        try:
            other = store.load(name)
        except (UpcallError, OSError):
            unknown.append(name)
            continue
        if other.signature == entry.signature:
            same_key.append(name)
        if _is_same_file(entry, other):
            same_file.append(name)
    return Sharing(tuple(same_key), tuple(same_file), tuple(unknown))


def users_of(store: KeyStore, path: Path) -> list[str]:
    """Returns the names of the keys whose file this is, by path or inode. Entries that cannot be read are skipped."""
    found = []
    for name in store.names():
        try:
            other = store.load(name)
        except (UpcallError, OSError):
            continue
        if other.path is not None and _is_same(str(path), other.path):
            found.append(name)
    return found


def _is_same_file(entry: Entry, other: Entry) -> bool:
    if entry.path is None or other.path is None:
        return False
    return entry.signature == other.signature or _is_same(entry.path, other.path)


def _is_same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return Path(one).samefile(other)
    except OSError:
        return False
