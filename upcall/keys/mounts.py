"""Stores a user's mounts by name: one TOML file per mount in $XDG_DATA_HOME/upcall/mounts, without secrets.

The key is stored by its signature, which a change of its name does not affect.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.keys.private_file import read_private, replace_private
from upcall.keys.store import NAME, SIGNATURE, SUFFIX, default_directory

MAX_FILE: Final = 16 * 1024  # bytes
EVENTS: Final = ("lock", "logout")  # of the user's session, at which a mount can be taken away


class MountEntry(NamedTuple):
    """A mount. `lower`, `upper`: absolute paths. `signatures`: of its keys. `key_bytes`: of the keys of new files."""

    name: str
    lower: str
    upper: str
    signatures: tuple[str, ...]
    key_bytes: int = 16
    names_signature: str = ""  # of the passphrase that encrypts file names
    auto: bool = False  # the daemon mounts it when it starts
    unmount_on: tuple[str, ...] = ()  # of EVENTS


_TYPES: Final[dict[str, tuple[type, str]]] = {
    "lower": (str, "a string"),
    "upper": (str, "a string"),
    "signatures": (list, "a list of strings"),
    "key_bytes": (int, "a number"),
    "names_signature": (str, "a string"),
    "auto": (bool, "true or false"),
    "unmount_on": (list, "a list of strings"),
}
_REQUIRED: Final = ("lower", "upper", "signatures")


def mounts_directory() -> Path:
    """Returns the store's directory, beside that of keys."""
    return default_directory().with_name("mounts")


def check_mount_name(name: str) -> None:
    """UsageError unless `name` is valid as the name of a mount and of its file."""
    if not NAME.fullmatch(name) or name.endswith(SUFFIX):
        raise UsageError(f"{name!r} cannot be the name of a mount: letters, digits and ._@+- are allowed, at most 64")


class MountStore:
    """Reads and writes the entries. Keeps nothing in memory. Methods raise OSError if the file system fails."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = mounts_directory() if directory is None else directory

    def names(self) -> list[str]:
        """Returns the sorted names of all entries, valid or not."""
        try:
            files = [file.name for file in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        names = [file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX)]
        return sorted(name for name in names if NAME.fullmatch(name))

    def load(self, name: str) -> MountEntry:
        """Reads an entry. UsageError if there is no such mount; PeerError if its file is malformed."""
        path = self._path(name)
        try:
            text, _ = read_private(path, MAX_FILE)
        except FileNotFoundError:
            raise UsageError(f"no mount {name!r} is known: `upcall mount {name} LOWER UPPER` makes it known") from None
        return _parse(name, bytes(text), str(path))

    def find(self, name: str) -> MountEntry | None:
        """Returns the entry; None if there is none. Otherwise as `load`."""
        return self.load(name) if os.path.lexists(self._path(name)) else None

    def check(self, entry: MountEntry) -> None:
        """UsageError if the entry cannot be written, because a path is not UTF-8."""
        _text_of(entry)

    def save(self, entry: MountEntry) -> None:
        """Writes an entry, or replaces it atomically. UsageError as `check`."""
        path = self._path(entry.name)
        self.directory.mkdir(0o700, parents=True, exist_ok=True)
        replace_private(path, _text_of(entry))

    def remove(self, name: str) -> None:
        """UsageError if there is no such mount."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise UsageError(f"no mount {name!r} is known") from None

    def all(self) -> list[MountEntry]:
        """Returns all entries that are valid."""
        found = []
        for name in self.names():
            with contextlib.suppress(PeerError, UsageError, OSError):
                found.append(self.load(name))
        return found

    def _path(self, name: str) -> Path:
        check_mount_name(name)
        return self.directory / (name + SUFFIX)


def _text_of(entry: MountEntry) -> bytes:
    import tomli_w

    told = {key: value for key, value in entry._asdict().items() if key != "name" and value not in ("", False, ())}
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
    try:
        return tomli_w.dumps(told).encode()
    except UnicodeEncodeError:
        raise UsageError("the path of a folder is not UTF-8, which TOML cannot say") from None


def _parse(name: str, text: bytes, where: str) -> MountEntry:
    try:
        told: dict[str, Any] = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise PeerError(where, str(error)) from None
    if unknown := sorted(told.keys() - _TYPES.keys()):
        raise PeerError(where, f"unknown key {unknown[0]!r}")
    for key, (kind, called) in _TYPES.items():
        if key in _REQUIRED and key not in told:
            raise PeerError(where, f"{key!r} is missing")
        if key in told and type(told[key]) is not kind:
            raise PeerError(where, f"{key!r} must be {called}")
        if kind is list and key in told:
            told[key] = tuple(map(str, told[key]))
    entry = MountEntry(name, **told)
    if not entry.lower.startswith("/") or not entry.upper.startswith("/"):
        raise PeerError(where, "'lower' and 'upper' must be absolute paths")
    names = (entry.names_signature,) if entry.names_signature else ()
    if not 1 <= len(entry.signatures) <= 4 or not all(map(SIGNATURE.fullmatch, (*entry.signatures, *names))):
        raise PeerError(where, "signatures must be one to four, of 16 hexadecimal digits each")
    if entry.key_bytes not in (16, 24, 32):
        raise PeerError(where, "'key_bytes' must be 16, 24 or 32")
    if unknown := [event for event in entry.unmount_on if event not in EVENTS]:
        raise PeerError(where, f"'unmount_on': {unknown[0]!r} is not one of {', '.join(EVENTS)}")
    return entry
