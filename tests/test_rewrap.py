"""Lower files get another key: every outcome, every moment of a kill, and half-written headers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from upcall.core.errors import PeerError, Refused, UpcallError, UsageError
from upcall.kernel.mounts import Mount
from upcall.protocols.ecryptfs import rewrap as rewrap_module
from upcall.protocols.ecryptfs.header import (
    ENCRYPTED,
    IN_XATTR,
    MAX_HEADER,
    XATTR,
    Change,
    Header,
    Packet,
    PassphrasePacket,
    PublicKeyPacket,
    pack_header,
    replace_packets,
    take_header,
)
from upcall.protocols.ecryptfs.lower_file import Found, Skipped, Walk
from upcall.protocols.ecryptfs.mounted import check_unmounted, lower_folders
from upcall.protocols.ecryptfs.packets import CIPHER_AES_128, CIPHER_OPAQUE, FileKey, pack_file_key, take_file_key
from upcall.protocols.ecryptfs.rewrap import BATCH, Entry, Survey, Wish, prove, rewrap
from upcall.protocols.ecryptfs.rewrap_journal import Journal, Record, pack_records, recover, restore, take_records

OLD, NEW, THEIRS = "00112233445566aa", "8899aabbccddeeff", "7777777777777777"
DATA = random.Random(1).randbytes(4096)
WISH = Wish(NEW)


class ToyKeys:
    """Keys that need no daemon: a wrapped key is a nonce, and the key under a digest of signature and nonce."""

    size = 480  # bytes of a wrapped key: as many as span two sectors of a disk

    def __init__(self, *own: str) -> None:
        self.own = own or (OLD, NEW)

    def holds(self, packet: Packet) -> bool:
        return packet.signature in self.own

    def wrap(self, signature: str, key: FileKey) -> bytes:
        clear, nonce = pack_file_key(key), os.urandom(self.size)
        return nonce + _mask(clear, signature, nonce)

    def unwrap(self, packet: Packet) -> FileKey:
        if packet.signature not in self.own:
            raise Refused("no-key")
        nonce, masked = packet.wrapped[: self.size], packet.wrapped[self.size :]
        return take_file_key(_mask(masked, packet.signature, nonce))


def _mask(data: bytes, signature: str, nonce: bytes) -> bytes:
    mask = hashlib.sha512(signature.encode() + nonce).digest()
    return bytes(one ^ other for one, other in zip(data, mask, strict=False))


KEYS = ToyKeys()


def file_key(path: Path) -> FileKey:
    return FileKey(CIPHER_AES_128, hashlib.sha256(path.name.encode()).digest()[:16])


def lower(path: Path, *signatures: str, mode: int = 0o644) -> Path:
    """Makes a lower file whose key these keys have wrapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = [PublicKeyPacket(one, KEYS.wrap(one, file_key(path))) for one in signatures or (OLD,)]
    header = Header(100, 0xDEADBEEF, 3, ENCRYPTED, 4096, 2, tuple(wrapped))
    path.write_bytes(pack_header(header).ljust(8192, b"\0") + DATA)
    path.chmod(mode)
    os.utime(path, ns=(1_000_000_000_123_456_789, 1_100_000_000_123_456_789))
    return path


def signatures(path: Path) -> list[str]:
    """The keys of a file, each of which was proved to open it."""
    header = take_header(path.read_bytes()[:MAX_HEADER])
    for packet in header.packets:
        assert ToyKeys(OLD, NEW, THEIRS).unwrap(packet) == file_key(path)
    assert path.read_bytes()[8192:] == DATA
    return [packet.signature for packet in header.packets]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "lower").mkdir()
    return tmp_path


def run(home: Path, wish: Wish = WISH, keys: Any = KEYS, *, path: Path | None = None, **options: Any) -> list[Entry]:
    """Surveys and rewraps what is below `lower`; returns what became of every file, by path."""
    list(recover(home / "journal"))
    walk = Walk(path or home / "lower", recursive=True, **options)
    survey = Survey(wish, keys)
    entries = {entry.path: entry for entry in survey.look(walk)}
    journal = Journal(home / "journal")
    try:
        entries |= {entry.path: entry for entry in rewrap(survey.tasks, wish, keys, journal, threads=2)}
    finally:
        journal.close()
        walk.close()
    return sorted(entries.values(), key=lambda entry: entry.path)


def outcomes(entries: list[Entry]) -> list[str]:
    return [entry.outcome for entry in entries]


# --- what is replaced ---------------------------------------------------------------------------------------------


def test_the_new_key_replaces_the_old_and_nothing_else_changes(home: Path) -> None:
    path = lower(home / "lower/a/f")
    path.chmod(0o640)
    before, data = path.stat(), path.read_bytes()
    (entry,) = run(home)
    assert (entry.outcome, entry.old, entry.path) == ("rewrapped", OLD, path)
    assert signatures(path) == [NEW]
    after = path.stat()
    for field in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink", "st_blocks"):
        assert getattr(after, field) == getattr(before, field)
    assert path.read_bytes()[:26] == data[:26]
    assert outcomes(run(home)) == ["current"]
    assert list((home / "journal").iterdir()) == []


def test_packets_of_other_keys_stay_in_their_places(home: Path) -> None:
    path = lower(home / "lower/f", THEIRS, OLD, THEIRS)
    data = path.read_bytes()
    assert outcomes(run(home)) == ["rewrapped"]
    assert signatures(path) == [THEIRS, NEW, THEIRS]
    first = data[26 : 26 + 3 + 10 + len(KEYS.wrap(OLD, file_key(path)))]
    assert path.read_bytes()[26:].startswith(first)


def test_with_keep_the_old_key_stays_and_from_drops_it_later(home: Path) -> None:
    path = lower(home / "lower/f")
    wish = Wish(NEW, keep=True)
    assert outcomes(run(home, wish)) == ["rewrapped"]
    assert signatures(path) == [OLD, NEW]
    assert outcomes(run(home, wish)) == ["current"]
    assert outcomes(run(home)) == ["current"]
    assert outcomes(run(home, Wish(NEW, OLD))) == ["rewrapped"]
    assert signatures(path) == [NEW]
    assert path.read_bytes()[26 + 3 + 10 + KEYS.size + 19 : 8192].strip(b"\0") == b""


def test_only_the_key_of_from_is_replaced(home: Path) -> None:
    lower(home / "lower/a", OLD)
    lower(home / "lower/b", THEIRS)
    keys = ToyKeys(OLD, NEW, THEIRS)
    entries = run(home, Wish(NEW, THEIRS), keys)
    assert outcomes(entries) == ["other-key", "rewrapped"]
    assert entries[0].why == f"not wrapped with {THEIRS}"
    assert signatures(home / "lower/a") == [OLD]


def test_a_second_key_of_ones_own_is_tried_if_the_first_does_not_unwrap(home: Path) -> None:
    path = lower(home / "lower/f", THEIRS, OLD)

    class Believing(ToyKeys):
        def holds(self, packet: Packet) -> bool:
            return True

    assert outcomes(run(home, keys=Believing())) == ["rewrapped"]
    assert signatures(path) == [THEIRS, NEW]


def test_files_of_other_keys_are_named_with_them(home: Path) -> None:
    path = lower(home / "lower/f", THEIRS)
    (entry,) = run(home)
    assert (entry.outcome, entry.why) == ("other-key", f"none of its keys is yours: {THEIRS}")
    assert signatures(path) == [THEIRS]


def test_a_read_only_file_is_rewrapped_and_stays_read_only(home: Path) -> None:
    path = lower(home / "lower/f", mode=0o444)
    assert outcomes(run(home)) == ["rewrapped"]
    assert signatures(path) == [NEW]
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_file_with_two_names_is_rewrapped_once(home: Path) -> None:
    path = lower(home / "lower/a")
    (home / "lower/b").hardlink_to(path)
    entries = run(home)
    assert outcomes(entries) == ["rewrapped", "skipped"]
    assert entries[1].why == f"another name of {path}"
    assert path.samefile(home / "lower/b")


def test_a_path_that_is_given_twice_is_looked_at_once(home: Path) -> None:
    lower(home / "lower/a")
    survey = Survey(WISH, KEYS)
    walks = [Walk(path, recursive=True) for path in (home / "lower", home / "lower/a", home / "lower/../lower")]
    assert [outcomes(list(survey.look(walk))) for walk in walks] == [["pending"], [], []]
    for walk in walks:
        walk.close()


def test_a_hole_in_the_data_stays_a_hole(home: Path) -> None:
    path = lower(home / "lower/f")
    os.truncate(path, 64 << 20)
    blocks = path.stat().st_blocks
    assert outcomes(run(home)) == ["rewrapped"]
    assert path.stat().st_blocks == blocks


def test_a_header_in_an_attribute_is_replaced_there(home: Path) -> None:
    path = lower(home / "lower/f")
    data = path.read_bytes()
    header = take_header(data[:MAX_HEADER])
    path.write_bytes(DATA)
    try:
        os.setxattr(path, XATTR, pack_header(header._replace(flags=ENCRYPTED | IN_XATTR)))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            pytest.skip("this file system has no attributes of the user")
        raise
    assert outcomes(run(home)) == ["rewrapped"]
    (packet,) = take_header(os.getxattr(path, XATTR)).packets
    assert packet.signature == NEW
    assert KEYS.unwrap(packet) == file_key(path)
    assert path.read_bytes() == DATA


# --- what is left alone -------------------------------------------------------------------------------------------


def test_links_devices_plain_and_damaged_files_are_left_alone_and_the_rest_goes_on(home: Path) -> None:
    good = lower(home / "lower/z")
    outside = lower(home / "outside/f")
    (home / "lower/a-link").symlink_to(outside)
    (home / "lower/b-folder").symlink_to(outside.parent)
    os.mkfifo(home / "lower/c-fifo")
    (home / "lower/d-plain").write_text("in clear")
    damaged = lower(home / "lower/e-damaged")
    with damaged.open("r+b") as file:
        file.seek(26)
        file.write(b"\x05")
    short = lower(home / "lower/f-short")
    os.truncate(short, 100)
    entries = run(home)
    assert [(entry.path.name, entry.outcome) for entry in entries] == [
        ("a-link", "skipped"),
        ("b-folder", "skipped"),
        ("c-fifo", "skipped"),
        ("d-plain", "not-encrypted"),
        ("e-damaged", "failed"),
        ("f-short", "failed"),
        ("z", "rewrapped"),
    ]
    assert entries[4].why == "eCryptfs header: unknown tag 0x05 at byte 26"
    assert signatures(outside) == [OLD]
    assert signatures(good) == [NEW]


def test_a_link_is_refused_as_a_path_and_a_folder_needs_recursion(home: Path) -> None:
    lower(home / "lower/f")
    (home / "link").symlink_to(home / "lower/f")
    with pytest.raises(OSError, match="symbolic link") as caught:
        Walk(home / "link", recursive=True)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(IsADirectoryError, match="-r"):
        Walk(home / "lower", recursive=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give links away")
def test_links_of_another_user_on_the_way_are_not_followed(home: Path) -> None:
    """Another user could have them lead anywhere, at any time."""
    lower(home / "lower/a/f")
    (home / "own").symlink_to("lower")
    (home / "absolute").symlink_to(home / "own")
    (home / "theirs").symlink_to("lower")
    os.chown(home / "theirs", 65534, 65534, follow_symlinks=False)
    for way in ("own/a", "absolute/a", "own/../lower/a", "absolute/a/../a/f"):
        walk = Walk(home / way, recursive=True)
        assert [str(found.path) for found in walk] == [f"{home}/lower/a/f"]
        walk.close()
    for way in ("theirs/a", "theirs/a/f", "own/../theirs/a"):
        with pytest.raises(OSError, match="a symbolic link of uid 65534 is on the way"):
            Walk(home / way, recursive=True)
    (home / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"Too many levels of symbolic links"):
        Walk(home / "loop/x", recursive=True)
    before = len(os.listdir("/proc/self/fd"))
    for way in ("theirs/a", "loop/x", "missing/x", "lower/a/f/x"):
        with contextlib.suppress(OSError):
            Walk(home / way, recursive=True).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_that_was_checked_is_walked_wherever_its_path_leads_by_then(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user exchanges it with a link between the check and the opening."""
    lower(home / "lower/f")
    lower(home / "victim/f")
    stat_of = os.stat

    def swapping(name: Any, **more: Any) -> os.stat_result:
        found = stat_of(name, **more)
        if name == "lower" and not (home / "lower").is_symlink():
            (home / "lower").rename(home / "away")
            (home / "lower").symlink_to("victim")
        return found

    monkeypatch.setattr(os, "stat", swapping)
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        Walk(home / "lower", recursive=True)


def test_a_relative_path_and_those_of_dots_are_walked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower(home / "lower/a/f")
    monkeypatch.chdir(home / "lower/a")
    for way in (".", "..", "../a", "f", "./f"):
        walk = Walk(Path(way), recursive=True)
        assert [str(found.path) for found in walk] == [f"{home}/lower/a/f"]
        walk.close()


def test_folders_that_are_too_deep_are_reported_and_what_follows_them_is_found(home: Path) -> None:
    lower(home / "lower/z")
    deep = os.open(home / "lower", os.O_RDONLY)
    for name in ("a", *("d" * 500)):
        os.mkdir(name, dir_fd=deep)
        deeper = os.open(name, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = deeper
    os.close(deep)
    lower(home / "lower/b/f")
    walk = Walk(home / "lower", recursive=True)
    found = list(walk)
    walk.close()
    assert [one.path.name for one in found if isinstance(one, Found)] == ["z", "f"]
    (skipped,) = [one for one in found if isinstance(one, Skipped)]
    assert skipped.error is not None and "more than 200 folders deep" in skipped.why


def test_the_path_that_is_shown_is_that_of_what_was_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lower(home / "lower/a/f")
    monkeypatch.chdir(home / "lower")
    for named in ("a", ".", "../lower/a", "a/f"):
        walk = Walk(Path(named), recursive=True)
        assert [found.path for found in walk] == [path]
        walk.close()
    walk = Walk(Path("a"), recursive=True)
    (home / "lower/a").rename(home / "moved")
    (home / "lower/a").symlink_to(lower(home / "outside/f").parent)
    (found,) = walk
    assert isinstance(found, Found)
    with found.open() as file:
        assert file.stat.st_ino == (home / "moved/f").stat().st_ino
    walk.close()


def test_a_walk_needs_few_descriptors_and_goes_on_when_they_run_out(home: Path) -> None:
    nested = lower(home / "lower" / "/".join("a" * 60) / "f")
    beside = lower(home / "lower/z/f")
    walk = Walk(home / "lower", recursive=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        assert [found.path for found in walk] == [nested, beside]
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(walk.top))
        failed = list(walk)
        for fd in taken:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [(type(entry), entry.path) for entry in failed] == [(Skipped, home / "lower")]
    walk.close()


def test_a_folder_swapped_for_a_link_after_the_survey_is_not_followed(home: Path) -> None:
    lower(home / "lower/a/f")
    outside = lower(home / "outside/f")
    survey, walk = Survey(WISH, KEYS), Walk(home / "lower", recursive=True)
    assert outcomes(list(survey.look(walk))) == ["pending"]
    (home / "lower/a").rename(home / "moved")
    (home / "lower/a").symlink_to(outside.parent)
    journal = Journal(home / "journal")
    (entry,) = rewrap(survey.tasks, WISH, KEYS, journal, threads=1)
    journal.close()
    walk.close()
    assert (entry.outcome, entry.why) == ("failed", "Not a directory")
    assert signatures(outside) == [OLD]


def test_an_open_file_is_left_alone(home: Path) -> None:
    path = lower(home / "lower/f")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(path)!r}); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        (entry,) = run(home)
    finally:
        holder.communicate(b"\n")
    if entry.outcome == "rewrapped":
        pytest.skip("this file system has no leases")
    assert (entry.outcome, entry.why) == ("failed", "is open in another process, or in eCryptfs above")
    assert signatures(path) == [OLD]
    assert outcomes(run(home)) == ["rewrapped"]


def test_a_header_that_changes_before_it_is_written_is_left_alone(home: Path) -> None:
    path = lower(home / "lower/f")

    class Meddling(ToyKeys):
        def wrap(self, signature: str, key: FileKey) -> bytes:
            lower(path, THEIRS)
            return super().wrap(signature, key)

    (entry,) = run(home, keys=Meddling())
    assert (entry.outcome, entry.why) == ("failed", "its header changed meanwhile, start again")
    assert signatures(path) == [THEIRS]


def test_the_size_that_the_kernel_writes_meanwhile_is_kept(home: Path) -> None:
    path = lower(home / "lower/f")

    class Growing(ToyKeys):
        def wrap(self, signature: str, key: FileKey) -> bytes:
            with path.open("r+b") as file:
                file.write((4096).to_bytes(8, "big"))
            return super().wrap(signature, key)

    assert outcomes(run(home, keys=Growing())) == ["rewrapped"]
    assert take_header(path.read_bytes()[:MAX_HEADER]).size == 4096
    assert signatures(path) == [NEW]


class Wrong(ToyKeys):
    """A key that wraps another file's key than it was told to."""

    def wrap(self, signature: str, key: FileKey) -> bytes:
        return super().wrap(signature, key._replace(key=bytes(16)))


class Opaque(ToyKeys):
    def unwrap(self, packet: Packet) -> FileKey:
        return super().unwrap(packet)._replace(cipher=CIPHER_OPAQUE)


class Refusing(ToyKeys):
    def unwrap(self, packet: Packet) -> FileKey:
        raise Refused("module-failed")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (Wrong(), f"the key {NEW} unwraps another one than was wrapped"),
        (Opaque(), "none of eCryptfs's"),
        (Refusing(), "module-failed"),
    ],
    ids=["wrong", "opaque", "refused"],
)
def test_nothing_is_written_if_the_new_key_cannot_be_proved(home: Path, keys: ToyKeys, why: str) -> None:
    path = lower(home / "lower/f")
    before = path.read_bytes()
    (entry,) = run(home, keys=keys)
    assert entry.outcome == "failed"
    assert why in entry.why
    assert path.read_bytes() == before
    assert file_key(path).key.hex() not in repr(entry)


def test_keys_are_tried_with_one_file_each_and_nothing_is_written(home: Path) -> None:
    for name in "abc":
        lower(home / f"lower/{name}", OLD)
    lower(home / "lower/d", THEIRS)
    asked = []

    class Counting(ToyKeys):
        def wrap(self, signature: str, key: FileKey) -> bytes:
            asked.append(signature)
            return super().wrap(signature, key)

    keys = Counting(OLD, NEW, THEIRS)
    survey, walk = Survey(WISH, keys), Walk(home / "lower", recursive=True)
    assert outcomes(list(survey.look(walk))) == ["pending"] * 4
    assert prove(survey.tasks, WISH, keys) == []
    assert asked == [NEW, NEW]
    (failure,) = prove(survey.tasks[:3], WISH, Refusing())
    assert (failure.outcome, failure.old) == ("failed", OLD)
    walk.close()
    assert [signatures(home / f"lower/{name}") for name in "abcd"] == [[OLD]] * 3 + [[THEIRS]]


def test_a_failure_that_concerns_all_files_ends_the_run(home: Path) -> None:
    for number in range(3 * BATCH):
        lower(home / f"lower/{number:03}")

    class Locking(ToyKeys):
        left = BATCH + 5
        lock = threading.Lock()

        def unwrap(self, packet: Packet) -> FileKey:
            with self.lock:
                Locking.left -= packet.signature == OLD
                if Locking.left < 0:
                    raise Refused("locked")
            return super().unwrap(packet)

    survey, walk = Survey(WISH, Locking()), Walk(home / "lower", recursive=True)
    list(survey.look(walk))
    journal = Journal(home / "journal")
    entries = list(
        rewrap(survey.tasks, WISH, Locking(), journal, threads=2, stops=lambda error: isinstance(error, Refused))
    )
    journal.close()
    walk.close()
    assert outcomes(entries).count("rewrapped") == BATCH + 5
    assert len(entries) == 2 * BATCH
    assert outcomes(run(home)).count("rewrapped") == 2 * BATCH - 5


def test_a_mounted_folder_is_not_entered(home: Path) -> None:
    lower(home / "lower/a/f")
    found = (home / "lower/a").stat()
    entries = run(home, closed=[((found.st_dev, found.st_ino), "it is mounted")])
    assert [(entry.path.name, entry.outcome, entry.why) for entry in entries] == [("a", "failed", "it is mounted")]


def mounted_at(point: Path, source: str) -> Mount:
    return Mount(point.stat().st_dev, "/", str(point), "ecryptfs", source, frozenset())


def test_the_lower_folder_of_a_mount_by_upcall_is_named_with_the_command_that_unmounts(home: Path) -> None:
    lower(home / "lower/a/f")
    known = lower_folders([mounted_at(home / "lower", f"upcall:{os.geteuid()}:private")])
    walk = Walk(home / "lower/a", recursive=True)
    with pytest.raises(UsageError, match=f"eCryptfs has {home}/lower mounted at .*upcall umount private"):
        check_unmounted(home / "lower/a", walk.top, known)
    walk.close()


def test_the_lower_folder_of_another_users_mount_is_found_by_its_inode_number(home: Path) -> None:
    # As eCryptfs does it: the root of the mount has the number of the lower folder.
    lower(home / "lower/a/f")
    known = lower_folders([mounted_at(home / "lower", "upcall:64999:private")])
    walk = Walk(home / "lower/a", recursive=True)
    with pytest.raises(UsageError, match="unmount it first, or add --mounted"):
        check_unmounted(home / "lower/a", walk.top, known)
    walk.close()
    entries = run(home, path=home, closed=[(inode, "it is mounted") for inode in known.folders])
    assert [(entry.path.name, entry.outcome) for entry in entries] == [("lower", "failed")]


def test_a_mount_of_ones_own_whose_lower_folder_cannot_be_told_is_refused(home: Path) -> None:
    hidden = mounted_at(home, f"upcall:{os.geteuid()}:private")._replace(point=str(home / "none"))
    known = lower_folders([hidden])
    walk = Walk(home / "lower", recursive=True)
    with pytest.raises(UsageError, match=r"cannot be told .* --mounted"):
        check_unmounted(home / "lower", walk.top, known)
    walk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_files_of_others_are_left_alone(home: Path) -> None:
    path = lower(home / "lower/f")
    os.chown(path, 12345, 12345)
    (entry,) = run(home)
    assert (entry.outcome, entry.why) == ("failed", "belongs to uid 12345, not to you")


# --- killed -------------------------------------------------------------------------------------------------------

CALLS = ("open", "pwrite", "fsync", "ftruncate", "utime", "fchmod", "unlink", "close")
COUNT = 5


def in_child(work: Callable[[], None]) -> int:
    """Runs something in a child; returns its exit status, -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(number: int, written: int | None) -> None:
    """Has this process killed at its Nth system call that changes something; at a write, after `written` bytes of it
    (None: all of them)."""
    left = number

    def wrapped(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if name == "pwrite" and written is not None:
                    true(arguments[0], arguments[1][:written], arguments[2])
                elif number % 2:
                    true(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


@pytest.mark.parametrize("written", [None, 486, 505], ids=["whole", "first-sector", "most"])
def test_killed_at_any_system_call_every_file_has_the_old_or_the_new_key(home: Path, written: int | None) -> None:
    """486 bytes are what the first sector of the disk has of the packets."""
    killed = restored = 0
    number, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        paths = [lower(home / f"lower/{name}", mode=0o444 if name else 0o644) for name in range(COUNT)]

        def work(number: int = number) -> None:
            dying_at(number, written)
            run(home)

        status = in_child(work)
        killed += status != 0
        outcomes_of_recovery = [entry.outcome for entry in recover(home / "journal")]
        assert "unresolved" not in outcomes_of_recovery
        restored += outcomes_of_recovery.count("restored")
        for path in paths:
            assert signatures(path) in ([OLD], [NEW])
            assert stat.S_IMODE(path.stat().st_mode) == (0o444 if path.name != "0" else 0o644)
        assert list((home / "journal").iterdir() if (home / "journal").exists() else ()) == []
        assert set(outcomes(run(home))) <= {"rewrapped", "current"}
        assert [signatures(path) for path in paths] == [[NEW]] * COUNT
        for path in paths:
            path.unlink()
        number += 1
    assert status == 0
    assert killed > 40
    assert (restored > 0) == (written is not None)


def test_killed_at_random_moments_the_next_run_goes_on(home: Path) -> None:
    chance = random.Random(7)
    paths = [lower(home / f"lower/{number:02}") for number in range(30)]
    for _ in range(15):
        number = chance.randrange(120)

        def work(number: int = number) -> None:
            dying_at(number, chance.choice([None, chance.randrange(600)]))
            rewrap_module.BATCH = 4  # type: ignore[misc]
            run(home)

        in_child(work)
        for path in paths:
            with contextlib.suppress(PeerError):  # half written: the next run puts it in order
                assert take_header(path.read_bytes()[:MAX_HEADER]).packets[0].signature in (OLD, NEW)
    run(home)
    assert [signatures(path) for path in paths] == [[NEW]] * 30


# --- the journal --------------------------------------------------------------------------------------------------


def record_of(path: Path) -> Record:
    data = path.read_bytes()[:MAX_HEADER]
    change = replace_packets(data, [0], PublicKeyPacket(NEW, KEYS.wrap(NEW, file_key(path))))
    return Record(str(path), data[8:16], 0o644, change)


def patched(path: Path, record: Record, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(record.change.at)
        file.write(record.change.new[:count])


@pytest.mark.parametrize("sectors", range(1 << 2))
def test_any_mixture_of_old_and_new_sectors_is_restored(home: Path, sectors: int) -> None:
    path = lower(home / "lower/f")
    record = record_of(path)
    old, data = path.read_bytes(), bytearray(path.read_bytes())
    new = bytearray(data)
    new[record.change.at : record.change.at + len(record.change.new)] = record.change.new
    for sector in range(2):
        if sectors >> sector & 1:
            data[sector * 512 : (sector + 1) * 512] = new[sector * 512 : (sector + 1) * 512]
    path.write_bytes(data)
    assert restore(record) == (sectors not in (0, 3))
    assert path.read_bytes() == (new if sectors == 3 else old)


def left_behind(home: Path, *records: Record) -> Path:
    journal = home / "journal/1-x.journal"
    journal.parent.mkdir(mode=0o700, exist_ok=True)
    journal.write_bytes(pack_records(records))
    return journal


def test_a_header_that_was_changed_since_is_not_restored(home: Path) -> None:
    path = lower(home / "lower/f")
    record = record_of(path)
    lower(path, THEIRS)
    assert not restore(record)
    lower(path).write_bytes(b"another file".ljust(5000, b"."))
    assert not restore(record)


def test_a_damaged_header_and_a_missing_file_keep_their_journal(home: Path) -> None:
    path = lower(home / "lower/f")
    record = record_of(path)
    journal = left_behind(home, record, record._replace(path=str(home / "gone")))
    with path.open("r+b") as file:
        file.seek(26)
        file.write(b"\x77" * 20)
    damaged, gone = recover(home / "journal")
    assert (damaged.outcome, gone.outcome) == ("unresolved", "unresolved")
    assert "unknown tag" in damaged.why
    assert str(journal) in gone.why
    assert journal.exists()


def test_an_incomplete_journal_is_removed_and_changes_nothing(home: Path) -> None:
    path = lower(home / "lower/f")
    record = record_of(path)
    before = path.read_bytes()
    packed = pack_records([record])
    for size in (0, 10, 64, 65, len(packed) - 1):
        journal = left_behind(home)
        journal.write_bytes(packed[:size])
        assert list(recover(home / "journal")) == []
        assert not journal.exists()
    assert path.read_bytes() == before


def test_the_journal_of_a_running_process_is_left_alone(home: Path) -> None:
    path = lower(home / "lower/f")
    journal = Journal(home / "journal")
    journal.write([record_of(path)])
    assert list(recover(home / "journal")) == []
    assert journal.path.exists()
    journal.clear()
    journal.close()
    assert not journal.path.exists()


def test_a_journal_with_changes_that_are_not_finished_stays(home: Path) -> None:
    path = lower(home / "lower/f")
    journal = Journal(home / "journal")
    record = record_of(path)
    journal.write([record])
    patched(path, record, 486)
    journal.close()
    (entry,) = recover(home / "journal")
    assert (entry.path, entry.outcome) == (str(path), "restored")
    assert signatures(path) == [OLD]


def test_a_failing_disk_ends_the_run_and_keeps_the_journal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lower(home / "lower/f")

    def settle(written: rewrap_module.Written) -> Entry:
        change = written.prepared.change
        os.pwrite(written.fd, change.old[486:], change.at + 486)
        os.close(written.fd)
        return Entry(path, "failed", "Input/output error", error=OSError(errno.EIO, "Input/output error"))

    monkeypatch.setattr(rewrap_module, "settle", settle)
    with pytest.raises(OSError, match="cannot be written for certain"):
        run(home)
    monkeypatch.undo()
    assert [entry.outcome for entry in recover(home / "journal")] == ["restored"]
    assert signatures(path) == [OLD]


def test_a_folder_of_journals_that_others_can_write_to_is_refused(home: Path) -> None:
    (home / "journal").mkdir()
    (home / "journal").chmod(0o777)
    with pytest.raises(UsageError, match="not a folder of our own"):
        list(recover(home / "journal"))
    with pytest.raises(UsageError, match="not a folder of our own"):
        Journal(home / "journal")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_a_journal_of_another_user_is_not_taken(home: Path) -> None:
    """Who writes it chooses what is written into the headers of this user's files."""
    path = lower(home / "lower/f")
    record = record_of(path)
    journal = left_behind(home, record)
    patched(path, record, 486)
    before = path.read_bytes()
    os.chown(journal, 65534, 65534)
    assert list(recover(home / "journal")) == []
    assert path.read_bytes() == before
    os.chown(journal, os.geteuid(), os.getegid())
    assert [entry.outcome for entry in recover(home / "journal")] == ["restored"]
    assert signatures(path) == [OLD]


def test_journals_are_those_of_the_folder_that_was_checked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lower(home / "lower/f")
    record = record_of(path)
    patched(path, record, 486)
    before = path.read_bytes()
    planted = left_behind(home, record)
    planted.parent.rename(home / "planted")
    (home / "journal").mkdir(0o700)
    listdir = os.listdir

    def swapped(folder: int) -> list[str]:
        (home / "journal").rename(home / "checked")
        (home / "planted").rename(home / "journal")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", swapped)
    assert list(recover(home / "journal")) == []
    assert path.read_bytes() == before


def test_a_journal_that_another_run_takes_before_it_is_locked_is_made_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lower(home / "lower/f")
    flock = fcntl.flock
    taken: list[int] = []

    def late(fd: int, how: int) -> None:
        if not taken:
            taken.append(fd)
            assert list(recover(home / "journal")) == []
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    journal = Journal(home / "journal")
    journal.write([record_of(path)])
    assert [one.name for one in (home / "journal").iterdir()] == [journal.path.name]
    journal.clear()
    journal.close()


def test_records_are_read_back_as_written(home: Path) -> None:
    record = Record(os.fsdecode(b"/a/\xff\n"), b"12345678", 0o444, Change(26, b"old", b"new"))
    assert take_records(pack_records([record, record])) == [record, record]
    for bad in (
        record._replace(path="relative"),
        record._replace(marker=b"short"),
        record._replace(change=Change(8, b"old", b"new")),
        record._replace(change=Change(4095, b"old", b"new")),
        record._replace(change=Change(26, b"old", b"longer")),
    ):
        with pytest.raises(PeerError):
            take_records(pack_records([bad]))


# --- the header ---------------------------------------------------------------------------------------------------


def test_a_change_concerns_packets_only(home: Path) -> None:
    data = lower(home / "lower/f", THEIRS, OLD).read_bytes()[:MAX_HEADER]
    change = replace_packets(data, [1], PublicKeyPacket(NEW, b"w" * 100))
    assert (change.at, len(change.old)) == (26, len(change.new))
    assert data[change.at : change.at + len(change.old)] == change.old


def test_packets_that_do_not_fit_are_refused() -> None:
    packet = PublicKeyPacket(OLD, b"w" * 512)
    header = Header(1, 2, 3, ENCRYPTED, 4096, 2, (packet,) * 7)
    data = pack_header(header).ljust(MAX_HEADER, b"\0")
    with pytest.raises(PeerError, match="no room"):
        replace_packets(data, (), packet)
    assert replace_packets(data, [0], packet._replace(signature=NEW)).at == 26


def test_a_passphrase_packet_is_replaced_with_the_packet_behind_it() -> None:
    passphrase = PassphrasePacket(OLD, b"k" * 16, 7, b"saltsalt", 0x60)
    other = passphrase._replace(signature=THEIRS)
    data = pack_header(Header(1, 2, 3, ENCRYPTED, 4096, 2, (passphrase, other))).ljust(MAX_HEADER, b"\0")
    change = replace_packets(data, [0], PublicKeyPacket(NEW, b"w" * 128))
    changed = data[: change.at] + change.new + data[change.at + len(change.new) :]
    assert take_header(changed).packets == (PublicKeyPacket(NEW, b"w" * 128), other)


@pytest.fixture(autouse=True)
def _no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def test_errors_carry_no_key(home: Path) -> None:
    path = lower(home / "lower/f")
    with pytest.raises(UpcallError) as caught:
        ToyKeys("another one").unwrap(take_header(path.read_bytes()[:MAX_HEADER]).packets[0])
    assert file_key(path).key.hex() not in str(caught.value)
