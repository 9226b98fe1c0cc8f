"""Makes changes of headers survive a crash: keeps the bytes that are about to be replaced until the new ones are on
disk.

A header spans sectors of the disk. When the machine loses power while it is written, some can be new and some old,
and the file's key is lost. So the changes of a batch of files are written to a journal, and reach the disk, before
the first file is written. The next run finds the journal of a run that has ended, and puts back the old bytes of a
header that is mixed of both.

A journal is the SHA-256 of its JSON text, in hexadecimal digits, a newline, and that text. A journal whose digest does
not fit was not complete, and no file was written yet. A running process holds a lock (flock) on its journal.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.process.paths import own_folder
from upcall.protocols.ecryptfs.header import MAX_HEADER, Change, take_header
from upcall.protocols.ecryptfs.lower_file import NotEncrypted, read_header

SUFFIX: Final = ".journal"
_MARKER: Final = slice(8, 16)  # of a header: random, and so it identifies the file
_LIMIT: Final = 64 << 20  # bytes
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def default_folder() -> Path:
    """Returns the folder of journals. A relative $XDG_STATE_HOME is ignored (XDG base directory specification)."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "upcall" / "rewrap"


class Record(NamedTuple):
    """A change of one file. `path`: absolute; `mode`: of the file, which is given back to one that was read-only."""

    path: str
    marker: bytes  # 8 bytes
    mode: int
    change: Change


def pack_records(records: Iterable[Record]) -> bytes:
    """Returns the bytes of a journal."""
    entries = [
        {
            "path": base64.b64encode(os.fsencode(record.path)).decode(),
            "marker": record.marker.hex(),
            "mode": record.mode,
            "at": record.change.at,
            "old": record.change.old.hex(),
            "new": record.change.new.hex(),
        }
        for record in records
    ]
    text = json.dumps(entries).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def take_records(data: bytes) -> list[Record]:
    """Parses a journal. PeerError if it is not complete, or malformed."""
    digest, newline, text = data.partition(b"\n")
    if not newline or digest != hashlib.sha256(text).hexdigest().encode():
        raise PeerError("journal", "is not complete")
    try:
        entries = json.loads(text)
        records = [_record(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
        raise PeerError("journal", f"is malformed: {type(error).__name__}") from None
    return records


def _record(entry: dict[str, Any]) -> Record:
    change = Change(int(entry["at"]), bytes.fromhex(entry["old"]), bytes.fromhex(entry["new"]))
    marker = bytes.fromhex(entry["marker"])
    path = os.fsdecode(base64.b64decode(entry["path"], validate=True))
    fits = _MARKER.stop <= change.at and change.at + len(change.old) <= MAX_HEADER
    if not fits or len(change.old) != len(change.new) or len(marker) != 8 or not path.startswith("/") or "\0" in path:
        raise ValueError
    return Record(path, marker, stat.S_IMODE(int(entry["mode"])), change)


class Journal:
    """The journal of this process. OSError, UsageError: the folder is not ours alone. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        own_folder(folder, 0o700)
        self._directory = _open_own(folder)
        try:
            self._fd, name = self._new()
            os.fsync(self._directory)
        except BaseException:
            os.close(self._directory)
            raise
        self.path = folder / name
        self._unfinished = False

    def _new(self) -> tuple[int, str]:
        """Makes an empty journal and locks it. Until it is locked, another process may take it for one that was left,
        and remove it: then makes another."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            name = f"{os.getpid()}-{os.urandom(6).hex()}{SUFFIX}"
            fd = os.open(name, flags, 0o600, dir_fd=self._directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd, name
            os.close(fd)

    def write(self, records: Iterable[Record]) -> None:
        """Replaces the records. When it returns, they are on disk."""
        data = pack_records(records)
        self._unfinished = True
        os.ftruncate(self._fd, 0)
        at = 0
        while at < len(data):
            at += os.pwrite(self._fd, data[at:], at)
        os.fsync(self._fd)
        if os.fstat(self._fd).st_nlink == 0:
            raise OSError(errno.ENOENT, "was removed meanwhile, start again", str(self.path))

    def clear(self) -> None:
        """Drops the records, whose changes are on disk. A crash may bring them back: they are looked at, and change
        nothing."""
        os.ftruncate(self._fd, 0)
        self._unfinished = False

    def close(self) -> None:
        """Removes the journal, unless changes are unfinished: the next run looks at those."""
        if not self._unfinished:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path.name, dir_fd=self._directory)
        os.close(self._fd)
        os.close(self._directory)


def _open_own(folder: Path) -> int:
    """Returns a descriptor of a folder of journals. UsageError unless it belongs to this user and others cannot write
    to it. All that is done in it is done by the descriptor: a folder above may be another user's, who could put
    another folder there. OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not _is_ours(os.fstat(fd)):
        os.close(fd)
        raise UsageError(f"{folder}: not a folder of our own that only we can write to")
    return fd


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


# --- after a crash --------------------------------------------------------------------------------------------


class Recovery(NamedTuple):
    """What became of one record of an interrupted run. `outcome`: "intact" (the old or the new header is there),
    "restored", or "unresolved", with `why`: its journal is kept."""

    path: str
    outcome: str
    why: str = ""


def recover(folder: Path) -> Iterator[Recovery]:
    """Finishes what interrupted runs have left, and removes their journals. Yields an entry for each of their files.
    OSError if the folder cannot be read; UsageError if others can write to it."""
    try:
        directory = _open_own(folder)
    except FileNotFoundError:
        return
    try:
        for name in sorted(os.listdir(directory)):  # noqa: PTH208 - of a descriptor
            if name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    yield from _recover_one(folder / name, directory)
    finally:
        os.close(directory)


def _recover_one(path: Path, directory: int) -> Iterator[Recovery]:
    fd = os.open(path.name, _READ, dir_fd=directory)
    try:
        if not _is_ours(os.fstat(fd)):
            return  # it says what to write into files of ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # of a process that runs
        try:
            records = take_records(os.pread(fd, _LIMIT, 0))
        except PeerError:
            records = []
        solved = True
        for record in records:
            try:
                outcome = Recovery(record.path, "restored" if restore(record) else "intact")
            except (OSError, PeerError) as error:
                why = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
                outcome, solved = Recovery(record.path, "unresolved", f"{why}; kept in {path}"), False
            yield outcome
        if solved:
            os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(fd)


def restore(record: Record) -> bool:
    """Puts the old bytes back if the header is mixed of old and new ones; returns whether it was. OSError if the file
    cannot be opened; PeerError if it is damaged otherwise."""
    fd = os.open(record.path, _READ)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "is not a file of ours", record.path)
        try:
            data, in_xattr = read_header(fd)
        except NotEncrypted:
            return False  # another file by now
        if data[_MARKER] != record.marker:
            return False
        if not record.mode & 0o200 and stat.S_IMODE(found.st_mode) == record.mode | 0o200:
            os.fchmod(fd, record.mode)
        if in_xattr:
            return False  # the kernel replaces attributes as a whole
        at, old, new = record.change
        there = data[at : at + len(old)]
        if there in (old, new):
            return False
        if len(there) != len(old) or any(byte not in pair for byte, *pair in zip(there, old, new, strict=True)):
            take_header(data)  # changed by somebody since, and in order
            return False
        writer = open_for_writing(fd, record.mode)
        try:
            os.pwrite(writer, old, at)
            os.fsync(writer)
        finally:
            give_mode_back(writer, record.mode)
            os.close(writer)
        return True
    finally:
        os.close(fd)


def open_for_writing(fd: int, mode: int) -> int:
    """Returns a descriptor for writing of the file that `fd` is open for reading, although its owner, this user, may
    only read it: it gets write permission. `mode`: what it had. The caller calls `give_mode_back`. OSError."""
    if not mode & 0o200:
        os.fchmod(fd, stat.S_IMODE(mode) | 0o200)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except BaseException:
        give_mode_back(fd, mode)
        raise


def give_mode_back(fd: int, mode: int) -> None:
    """Takes write permission away again, if `open_for_writing` has given it. OSError."""
    if not mode & 0o200:
        os.fchmod(fd, stat.S_IMODE(mode))
