"""Puts a new wrapped file key into the headers of lower files. The data, and the file's key, stay as they are.

Each header is replaced in place, by one write into the first page of the file, so that inode, hard links, owner, mode
and times stay. The bytes written are those of packets only: the kernel itself writes the file's size in front of
them, and never packets of a file that exists. Processes see the old packets or the new ones; a crash of the machine
may leave a mixture on disk, which the journal (rewrap_journal.py) puts right.

Before anything is written, the new wrapped key was unwrapped and compared with the file's key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hmac
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from upcall.core.errors import PeerError, UpcallError
from upcall.protocols.ecryptfs.header import (
    MAX_HEADER,
    XATTR,
    Change,
    Header,
    Packet,
    PassphrasePacket,
    PublicKeyPacket,
    replace_packets,
)
from upcall.protocols.ecryptfs.lower_file import Found, LowerFile, NotEncrypted, Skipped, Walk, read_header
from upcall.protocols.ecryptfs.packets import CIPHER_OPAQUE, FileKey
from upcall.protocols.ecryptfs.rewrap_journal import Journal, Record, give_mode_back, open_for_writing

BATCH: Final = 64  # files per journal: each costs a descriptor or two, and 1 KiB of the journal
_MARKER: Final = slice(8, 16)
_UNSURE: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})
# What fcntl says where nothing can be told of other opens: 9p, NFS, FUSE
_NO_LEASES: Final = frozenset({errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


class Keys(Protocol):
    """What wraps and unwraps file keys. Called by several threads. Errors are UpcallError, OSError or TimeoutError."""

    def holds(self, packet: Packet) -> bool:
        """Returns whether the packet's key is one of the user's."""

    def unwrap(self, packet: Packet) -> FileKey:
        """Returns the file's key, which is secret."""

    def wrap(self, signature: str, key: FileKey) -> bytes:
        """Wraps a file's key with the key of this signature."""


class Wish(NamedTuple):
    """What is to be done. `target`: signature of the new key; `source`: of the key that it replaces, None for
    whichever of the user's keys the file has; `keep`: the old one stays, too."""

    target: str
    source: str | None = None
    keep: bool = False


class Entry(NamedTuple):
    """What became of a file.

    `outcome`: "pending" (to be rewrapped), "rewrapped", "current" (nothing to do), "other-key" (its keys are not the
    user's, or not the wanted one), "not-encrypted", "skipped" or "failed"; `why`: details of the last four. `old`: the
    signature of the key that is replaced. `error`: of a failure."""

    path: Path
    outcome: str
    why: str = ""
    old: str = ""
    error: Exception | None = None


class Task(NamedTuple):
    """A file that is to be rewrapped."""

    found: Found
    old: str  # signature


# --- looking ------------------------------------------------------------------------------------------------------


class Survey:
    """Looks at lower files, and tells which are to be rewrapped. Writes nothing."""

    def __init__(self, wish: Wish, keys: Keys) -> None:
        self._wish, self._keys = wish, keys
        self._seen: dict[tuple[int, int], Path] = {}
        self.tasks: list[Task] = []

    def look(self, walk: Walk) -> Iterator[Entry]:
        """Yields an entry for each file. OSError if a folder cannot be listed."""
        for found in walk:
            if isinstance(found, Skipped):
                yield Entry(found.path, "failed" if found.error else "skipped", found.why, error=found.error)
            elif entry := self._look_at(found):
                yield entry

    def _look_at(self, found: Found) -> Entry | None:
        """Returns None for a file that was looked at before."""
        try:
            with found.open() as file:
                inode = file.stat.st_dev, file.stat.st_ino
                if inode in self._seen:
                    first = self._seen[inode]
                    return None if first == found.path else Entry(found.path, "skipped", f"another name of {first}")
                self._seen[inode] = found.path
                if file.stat.st_uid != os.geteuid():
                    why = f"belongs to uid {file.stat.st_uid}, not to you"
                    return _failed(found, PermissionError(errno.EPERM, why, str(found.path)))
                header = file.header()
        except NotEncrypted as error:
            return Entry(found.path, "not-encrypted", str(error), error=error)
        except (OSError, PeerError) as error:
            return _failed(found, error)
        candidates = sources(header, self._wish, self._keys)
        if isinstance(candidates, str):
            outcome = "current" if not candidates else "other-key"
            return Entry(found.path, outcome, candidates)
        old = header.packets[candidates[0]].signature
        self.tasks.append(Task(found, old))
        return Entry(found.path, "pending", old=old)


def sources(header: Header, wish: Wish, keys: Keys) -> list[int] | str:
    """Returns the numbers of the packets whose key the new one replaces, each a possibility. Otherwise a text: "" if
    nothing is to be done, or why nothing can be."""
    has_target = any(_is_target(packet, wish) for packet in header.packets)
    others = [number for number, packet in enumerate(header.packets) if not _is_target(packet, wish)]
    if wish.source is not None:
        chosen = [number for number in others if header.packets[number].signature == wish.source]
        if has_target and (wish.keep or not chosen):
            return ""
        return chosen or f"not wrapped with {wish.source}"
    if has_target:
        return ""
    own = [number for number in others if keys.holds(header.packets[number])]
    return own or "none of its keys is yours: " + ", ".join(map(_name, header.packets))


def _name(packet: Packet) -> str:
    return packet.signature + (" (a passphrase)" if isinstance(packet, PassphrasePacket) else "")


def _is_target(packet: Packet, wish: Wish) -> bool:
    return isinstance(packet, PublicKeyPacket) and packet.signature == wish.target


def _failed(found: Found, error: Exception, old: str = "") -> Entry:
    return Entry(found.path, "failed", _text(error), old, error)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# --- one file -----------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A file whose new header is known, and proved."""

    task: Task
    file: LowerFile
    old: str  # signature of the replaced key
    change: Change

    def record(self) -> Record:
        data = self.file.data
        return Record(str(self.task.found.path), data[_MARKER], self.file.stat.st_mode & 0o7777, self.change)


def prepare(task: Task, wish: Wish, keys: Keys) -> Prepared | Entry:
    """Makes the new header of a file, and proves it. Writes nothing. An entry if there is nothing to do, or it failed.
    The caller closes the file."""
    try:
        file = task.found.open()
    except (OSError, PeerError) as error:
        return _failed(task.found, error, task.old)
    try:
        if file.stat.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "belongs to somebody else by now", str(task.found.path))
        header = file.header()
        candidates = sources(header, wish, keys)
        if isinstance(candidates, str):
            os.close(file.fd)
            return Entry(task.found.path, "other-key" if candidates else "current", candidates)
        number, change = _changed(file, header, candidates, wish, keys)
        return Prepared(task, file, header.packets[number].signature, change)
    except (OSError, UpcallError) as error:
        os.close(file.fd)
        return _failed(task.found, error, task.old)
    except BaseException:
        os.close(file.fd)
        raise


def _changed(file: LowerFile, header: Header, candidates: list[int], wish: Wish, keys: Keys) -> tuple[int, Change]:
    """Returns the number of the packet that is replaced, and the change."""
    number, key = _unwrap_one(header, candidates, keys)
    present = [packet for packet in header.packets if _is_target(packet, wish)]
    added = None if present else PublicKeyPacket(wish.target, keys.wrap(wish.target, key))
    proof = keys.unwrap(added or present[0])
    if proof.cipher != key.cipher or not hmac.compare_digest(proof.key, key.key):
        raise PeerError("file key", f"the key {wish.target} unwraps another one than was wrapped")
    # In an attribute there is room behind the header.
    data = file.data.ljust(MAX_HEADER, b"\0") if file.in_xattr else file.data
    return number, replace_packets(data, () if wish.keep else (number,), added)


def _unwrap_one(header: Header, candidates: list[int], keys: Keys) -> tuple[int, FileKey]:
    """Unwraps the first packet that can be. Raises the first error if none can."""
    first: UpcallError | OSError | None = None
    for number in candidates:
        try:
            key = keys.unwrap(header.packets[number])
            if key.cipher == CIPHER_OPAQUE:
                raise PeerError("file key", "is none of eCryptfs's: a process had it wrapped", 0)
            return number, key
        except (UpcallError, OSError) as error:
            first = first or error
    assert first is not None  # noqa: S101 - there is at least one candidate
    raise first


class Written(NamedTuple):
    """A file whose new header is written, but perhaps not on disk yet. `fd`: for `settle`, which closes it."""

    prepared: Prepared
    fd: int


def write(prepared: Prepared) -> Written | Entry:
    """Writes the new header, and closes the file that was prepared. The record must be in the journal."""
    file = prepared.file
    try:
        try:
            writer = open_for_writing(file.fd, file.stat.st_mode)
        finally:
            os.close(file.fd)  # before the lease, which no other open may precede
        try:
            try:
                with _exclusive(writer):
                    _write(writer, prepared)
            finally:
                give_mode_back(writer, file.stat.st_mode)
        except BaseException:
            os.close(writer)
            raise
    except (OSError, UpcallError) as error:
        return _failed(prepared.task.found, error, prepared.old)
    return Written(prepared, writer)


def settle(written: Written) -> Entry:
    """Waits until the new header is on disk."""
    found, old = written.prepared.task.found, written.prepared.old
    try:
        os.fsync(written.fd)
    except OSError as error:
        return _failed(found, error, old)
    finally:
        os.close(written.fd)
    return Entry(found.path, "rewrapped", old=old)


def _write(writer: int, prepared: Prepared) -> None:
    """Writes the new header, unless it is no longer the one that the change was made for. OSError, PeerError."""
    path, file, change = str(prepared.task.found.path), prepared.file, prepared.change
    data, in_xattr = read_header(writer)
    if in_xattr != file.in_xattr or _packets(data, change) != _packets(file.data, change):
        raise OSError(errno.EBUSY, "its header changed meanwhile, start again", path)
    if in_xattr:
        # The kernel replaces an attribute as a whole. The size in clear, in front, is the present one.
        os.setxattr(writer, XATTR, data[: change.at] + change.new, os.XATTR_REPLACE)
    elif os.pwrite(writer, change.new, change.at) != len(change.new):
        raise OSError(errno.EIO, "was written in part", path)
    os.utime(writer, ns=(file.stat.st_atime_ns, file.stat.st_mtime_ns))
    written, _ = read_header(writer)
    if _packets(written, change) != change.new:
        raise OSError(errno.EIO, "does not read as it was written", path)


def _packets(data: bytes, change: Change) -> bytes:
    return data[change.at : change.at + len(change.new)].ljust(len(change.new), b"\0")


@contextlib.contextmanager
def _exclusive(fd: int) -> Iterator[None]:
    """Holds a lease, while which nobody else opens the file: others wait. OSError EBUSY if another process, or
    eCryptfs above, has it open. Does nothing on filesystems without leases."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # of one who waits; the default is SIGIO, which kills
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise OSError(errno.EBUSY, "is open in another process, or in eCryptfs above") from None
        if error.errno not in _NO_LEASES:
            raise
        yield
        return
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


# --- all files ----------------------------------------------------------------------------------------------------


def prove(tasks: Iterable[Task], wish: Wish, keys: Keys) -> list[Entry]:
    """Prepares one file of each old key, to prove that the keys work. Writes nothing. Returns the failures."""
    failures, proved = [], set[str]()
    for task in tasks:
        if task.old not in proved:
            proved.add(task.old)
            result = prepare(task, wish, keys)
            if isinstance(result, Prepared):
                os.close(result.file.fd)
            elif result.outcome == "failed":
                failures.append(result)
    return failures


def rewrap(
    tasks: Iterable[Task],
    wish: Wish,
    keys: Keys,
    journal: Journal,
    *,
    threads: int,
    stops: Callable[[Exception], bool] = lambda _: False,
) -> Iterator[Entry]:
    """Rewraps files; yields an entry for each that was tried. While one batch is written, the next is prepared.

    `stops`: told of a failure, whether it concerns all that follow: then these are not tried. Closing the iterator
    ends it after the batch."""
    batches = _batched(tasks, BATCH)
    with ThreadPoolExecutor(threads, "prepare") as preparers, ThreadPoolExecutor(threads, "commit") as committers:
        waiting = _submit(preparers, next(batches, []), wish, keys)
        try:
            while waiting:
                batch, stopped = [], False
                entries: list[Entry] = []
                for future in waiting:
                    result = future.result()
                    if isinstance(result, Prepared):
                        batch.append(result)
                    else:
                        entries.append(result)
                        stopped = stopped or (result.error is not None and stops(result.error))
                waiting = [] if stopped else _submit(preparers, next(batches, []), wish, keys)
                entries += _commit_all(batch, journal, committers)
                yield from entries
                _check_disk(entries)
                journal.clear()
        finally:
            for future in waiting:
                result = future.result()
                if isinstance(result, Prepared):
                    os.close(result.file.fd)


def _submit(pool: ThreadPoolExecutor, tasks: list[Task], wish: Wish, keys: Keys) -> list[Future[Prepared | Entry]]:
    return [pool.submit(prepare, task, wish, keys) for task in tasks]


def _commit_all(batch: list[Prepared], journal: Journal, pool: ThreadPoolExecutor) -> list[Entry]:
    if not batch:
        return []
    try:
        journal.write(prepared.record() for prepared in batch)
    except BaseException:
        for prepared in batch:
            os.close(prepared.file.fd)
        raise
    # All are written before the first is waited for: a filesystem then needs one transaction, not one for each file.
    results = list(pool.map(write, batch))
    entries = list(pool.map(settle, (result for result in results if isinstance(result, Written))))
    return entries + [result for result in results if isinstance(result, Entry)]


def _check_disk(entries: Iterable[Entry]) -> None:
    """OSError if it is unsure what is on the disk: the journal must stay."""
    for entry in entries:
        if isinstance(entry.error, OSError) and entry.error.errno in _UNSURE:
            why = "cannot be written for certain: stopped; the next run puts it in order"
            raise OSError(entry.error.errno, why, str(entry.path))


def _batched(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    iterator = iter(tasks)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
