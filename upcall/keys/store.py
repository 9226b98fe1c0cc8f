"""Stores a user's enrolled keys: one TOML file per key in $XDG_DATA_HOME/upcall/keys, without secrets.

The key itself belongs to the key module: it is in the file `path` or in a token, as the blob specifies. An entry
suffices to add the key's auth token to the user keyring again at the next login, when that keyring is empty.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import errno
import fcntl
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.core.suggestion import did_you_mean
from upcall.keymodule import MAX_BLOB
from upcall.keys.private_file import read_private, replace_private, sync_folder, write_new

MAX_FILE: Final = 16 * 1024  # bytes
SUFFIX: Final = ".toml"
COMPAT: Final = "compat"  # a source: the passphrase is in the auth token, as with ecryptfs-utils
_PATIENCE: Final = 10.0  # seconds that a command waits for another one
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}", re.ASCII)
SIGNATURE = re.compile(r"[0-9a-f]{16}")


class Entry(NamedTuple):
    """An enrolled key. No field is secret."""

    name: str
    module: str  # alias of the key module
    signature: str
    source: str  # of the passphrase: ask, keyring, none, file:/path or compat
    description: str
    created: datetime.datetime
    path: str | None = None  # of the key file, absolute; None without one
    blob: bytes | None = None  # for the auth token; None for a compat key, whose blob contains the passphrase
    parameters: Mapping[str, str] = MappingProxyType({})  # values chosen at enrolment, without secret ones
    auto: bool = False  # the daemon adds it to the user keyring when it starts
    own_file: bool | None = None  # `key generate` made the file in the store's folder; None: an older entry


_TYPES: Final[dict[str, tuple[type, str]]] = {
    "module": (str, "a string"),
    "signature": (str, "a string"),
    "source": (str, "a string"),
    "description": (str, "a string"),
    "created": (datetime.datetime, "a date and time"),
    "path": (str, "a string"),
    "blob": (str, "a string"),
    "parameters": (dict, "a table of strings"),
    "auto": (bool, "true or false"),
    "own_file": (bool, "true or false"),
}
_OPTIONAL: Final = frozenset({"path", "blob", "parameters", "auto", "own_file"})


def default_directory() -> Path:
    """Returns the store's directory. A relative $XDG_DATA_HOME is ignored (XDG base directory specification)."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "upcall" / "keys"


def check_name(name: str) -> None:
    """UsageError unless `name` is valid as the name of a key and of its file."""
    if not NAME.fullmatch(name) or name.endswith(SUFFIX):
        raise UsageError(f"{name!r} cannot be the name of a key: letters, digits and ._@+- are allowed, at most 64")


class KeyStore:
    """Reads and writes the entries. Keeps none in memory. Methods raise OSError if the file system fails."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self._changing = False

    @contextlib.contextmanager
    def changing(self, patience: float = _PATIENCE) -> Iterator[None]:
        """A context in which no other process changes the store by this class. Methods that write enter it by
        themselves; it can be entered again. BlockingIOError if another process stays in it for `patience` seconds."""
        if self._changing:
            yield
            return
        self.prepare()
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(fd, str(self.directory), patience)
            self._changing = True
            yield
        finally:
            self._changing = False
            os.close(fd)

    def names(self) -> list[str]:
        """Returns the sorted names of all entries, valid or not; [] if there is no directory. PermissionError if it
        belongs to another user than this process's or root."""
        try:
            with self._opened() as directory:
                files = os.listdir(directory)  # noqa: PTH208 - of a descriptor
        except FileNotFoundError:
            return []
        names = [name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)]
        return sorted(name for name in names if NAME.fullmatch(name))

    def load(self, name: str) -> Entry:
        """Reads an entry. UsageError if there is no such key; PeerError if its file is malformed: it names file and
        key."""
        path = self._path(name)
        try:
            with self._opened() as directory:
                text, _ = read_private(path, MAX_FILE, directory)
        except FileNotFoundError:
            raise UsageError(f"there is no key '{name}'{self._others(name)}") from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "is a symbolic link, put the file itself there", str(path)) from None
        return parse(name, bytes(text), str(path))

    def find(self, name_or_signature: str) -> Entry:
        """Returns the entry with this name, otherwise the one with this signature. UsageError if there is neither."""
        if not SIGNATURE.fullmatch(name_or_signature) or name_or_signature in self.names():
            return self.load(name_or_signature)
        for name in self.names():
            entry = self.load(name)
            if entry.signature == name_or_signature:
                return entry
        return self.load(name_or_signature)  # raises UsageError

    def with_signature(self, signature: str) -> list[str]:
        """Returns the names of the keys with this signature. Entries that cannot be read are skipped."""
        found = []
        for name in self.names():
            with contextlib.suppress(UpcallError, OSError):
                if self.load(name).signature == signature:
                    found.append(name)
        return found

    def owns_file(self, entry: Entry) -> bool:
        """Returns whether the key file was made for this entry, in the store's folder, and ends with it. Entries of
        older versions do not say so: there, it is a file in the folder that has the entry's name."""
        if entry.path is None or Path(entry.path).parent != self.directory:
            return False
        return Path(entry.path).stem == entry.name if entry.own_file is None else entry.own_file

    def save(self, entry: Entry) -> None:
        """Writes a new entry. FileExistsError if the name is in use; UsageError if the entry would contain a
        secret."""
        path, text = self._path(entry.name), text_of(entry)
        with self.changing():
            write_new(path, text)

    def replace(self, entry: Entry) -> None:
        """Replaces the entry of an existing key atomically. UsageError as `save`."""
        path, text = self._path(entry.name), text_of(entry)
        with self.changing():
            replace_private(path, text)

    def rename(self, name: str, new: str) -> None:
        """Gives a key another name, atomically. UsageError if there is no such key, or `new` cannot be a name;
        FileExistsError if `new` is in use."""
        old_path, new_path = self._path(name), self._path(new)
        with self.changing():
            entry = self.load(name)
            self.check_free(new)
            if entry.own_file is None and entry.path is not None:
                self.replace(entry._replace(own_file=self.owns_file(entry)))  # told by the name no more
            old_path.rename(new_path)
            sync_folder(self.directory)

    def remove(self, name: str) -> None:
        with self.changing():
            self._path(name).unlink()

    def check_free(self, name: str) -> None:
        """FileExistsError if there is a key with this name."""
        if os.path.lexists(self._path(name)):
            why = f"`upcall key show {name}` shows it, `upcall key remove {name}` deletes it"
            raise FileExistsError(errno.EEXIST, f"there is a key '{name}' already: {why}")

    def prepare(self) -> None:
        """Creates the directory with mode 0700. OSError if other users could create files in it."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(0o700, exist_ok=True)
        found = self.directory.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            why = f"uid {found.st_uid}, mode {mode:04o}: others can write here"
            raise PermissionError(errno.EPERM, why, str(self.directory))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yields a descriptor of the directory, whose owner is checked behind links. OSError."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            owner = os.fstat(fd).st_uid
            if owner not in (os.geteuid(), 0):
                why = f"the keys folder {self.directory} belongs to uid {owner}, not to uid {os.geteuid()} or root"
                raise PermissionError(errno.EPERM, why, str(self.directory))
            yield fd
        finally:
            os.close(fd)

    def _others(self, name: str) -> str:
        """Returns the end of the sentence that there is no key of this name: what to do instead."""
        names = self.names()
        if not names:
            return f", nor any other in {self.directory}: `upcall key generate` makes one"
        return did_you_mean(name, names) or f" in {self.directory}: `upcall key list` shows yours"

    def _path(self, name: str) -> Path:
        check_name(name)
        return self.directory / (name + SUFFIX)


def check_auto(source: str) -> None:
    """UsageError if a key with this source cannot be added automatically: the auth token of a compat key contains its
    passphrase, which is not stored."""
    if source == COMPAT:
        raise UsageError("the auth token of a compat key holds its passphrase: it cannot be added without asking")


def _lock(fd: int, where: str, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                why = "another command is changing the keys there: try again when it has ended"
                raise BlockingIOError(errno.EAGAIN, why, where) from None
            time.sleep(0.02)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
            return
        else:
            return


def text_of(entry: Entry) -> bytes:
    """Returns an entry's file. UsageError if it would contain a secret, or what TOML cannot express."""
    import tomli_w

    if entry.source == COMPAT and entry.blob is not None:
        raise UsageError("the blob of a compat key holds a secret: it is kept nowhere")
    told = {key: value for key, value in entry._asdict().items() if value is not None and key != "name"}
    told["parameters"] = dict(entry.parameters)
    if not entry.auto:
        del told["auto"]
    if entry.blob is not None:
        told["blob"] = base64.b64encode(entry.blob).decode("ascii")
    try:
        return tomli_w.dumps(told).encode()
    except UnicodeEncodeError:
        raise UsageError("a path or parameter is not UTF-8, which TOML cannot say") from None


def parse(name: str, text: bytes, where: str) -> Entry:
    """Parses an entry's file. `where`: names it in the PeerError that is raised if it is malformed."""
    try:
        told = tomllib.loads(text.decode())
    except ValueError as error:  # also UnicodeDecodeError, and int()'s own of numbers with more than 4300 digits
        raise PeerError(where, str(error)) from None
    except RecursionError:
        raise PeerError(where, "is nested too deeply") from None
    _check_types(told, where)
    if not SIGNATURE.fullmatch(told["signature"]):
        raise PeerError(where, "'signature' is not 16 hexadecimal digits")
    if not told.get("path", "/").startswith("/"):
        raise PeerError(where, "'path' is not absolute")
    if told["source"] not in ("ask", "keyring", "none", COMPAT) and not told["source"].startswith("file:/"):
        raise PeerError(where, "'source' is not ask, keyring, none, compat or file:/path")
    if ("blob" in told) is (told["source"] == COMPAT):
        raise PeerError(where, "'blob' of a compat key holds a secret" if "blob" in told else "'blob' is missing")
    if "blob" in told:
        told["blob"] = _take_blob(told["blob"], where)
    return Entry(name, **told)


def _check_types(told: Mapping[str, Any], where: str) -> None:
    if unknown := sorted(told.keys() - _TYPES.keys()):
        raise PeerError(where, f"unknown key {unknown[0]!r}")
    for key, (kind, called) in _TYPES.items():
        if key not in told and key not in _OPTIONAL:
            raise PeerError(where, f"{key!r} is missing")
        if key in told and not isinstance(told[key], kind):
            raise PeerError(where, f"{key!r} must be {called}")
    for key, value in told.get("parameters", {}).items():
        if not isinstance(value, str):
            raise PeerError(where, f"'parameters.{key}' must be a string")


def _take_blob(text: str, where: str) -> bytes:
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PeerError(where, f"'blob' is not base64: {error}") from None
    if len(blob) > MAX_BLOB:
        raise PeerError(where, f"'blob' has {len(blob)} bytes, at most {MAX_BLOB} are allowed")
    return blob
