"""`upcall ecryptfs rewrap` and `cat` on lower files of the real kernel, which reads every result.

Besides, writes small lower files to the folder of results: tests/vectors/lower_files.json is made of them.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from tests.kernel.scene import CONTENT, Vault, answered, enrol, keys, opening, strike_out, vault
from upcall.cli import main
from upcall.kernel import keyring
from upcall.protocols.ecryptfs.file_cipher import stretch
from upcall.protocols.ecryptfs.header import MAX_HEADER, Packet, PassphrasePacket, PublicKeyPacket, take_header
from upcall.testing.lab.stage import Person, Task, do_as, end, mount, start_broker, start_daemons, unmount, wait_until

T = TypeVar("T")
OLD, NEW = keys()["captured"], keys()["rsa2048"]
SALT = bytes.fromhex("0011223344556677")
MOUNT_PASSPHRASE = b"test"  # as in the tests of others: its signature is known
RESULTS = Path("/results")
SIZES = {"empty": 0, "one": 1, "extent": 4096, "more": 4097, "long": 70_000}


@pytest.fixture(scope="module", autouse=True)
def _people(alice: Person) -> Iterator[None]:
    enrol(alice, OLD)
    running = [start_broker()]
    try:
        running += start_daemons(alice)
        yield
    finally:
        enrol(alice, OLD)
        for process in reversed(running):
            end(process)


class Ran(NamedTuple):
    code: int
    out: bytes
    err: str


def run(who: Person, *arguments: str | Path) -> Ran:
    """Runs `upcall ecryptfs ...` as this person, in a forked child."""

    def work() -> Ran:
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        err = io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(["ecryptfs", *map(str, arguments)])
            except SystemExit as ended:
                code = int(ended.code or 0)
        buffer = out.buffer
        assert isinstance(buffer, io.BytesIO)
        return Ran(code, buffer.getvalue(), err.getvalue())

    return do_as(who, work, patience=1800)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def write(path: Path, data: bytes) -> None:
    patiently(lambda: path.write_bytes(data))


def make(who: Person, folder: Path) -> dict[str, bytes]:
    """Makes files of all sizes, and one with a hole; returns what they hold."""

    def work() -> None:
        for name, size in SIZES.items():
            write(folder / name, content(size))
        with (folder / "hole").open("wb") as file:
            file.seek(9000)
            file.write(b"end")

    do_as(who, work)
    return {**{name: content(size) for name, size in SIZES.items()}, "hole": bytes(9000) + b"end"}


def cat(who: Person, path: Path, *options: str | Path) -> bytes:
    result = run(who, "cat", path, *options)
    assert (result.code, result.err) == (0, "")
    return result.out


def packets(path: Path) -> tuple[Packet, ...]:
    return take_header(path.read_bytes()[:MAX_HEADER]).packets


def signatures(path: Path) -> list[str]:
    return [packet.signature for packet in packets(path)]


def keep(name: str, lower: Path, clear: bytes) -> None:
    """Writes a lower file to the results."""
    path = RESULTS / "lower_files.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    xattr = os.getxattr(lower, "user.ecryptfs") if "xattr" in name else b""
    kept[name] = {
        "lower": base64.b64encode(zlib.compress(lower.read_bytes())).decode(),
        "xattr": xattr.hex(),
        "size": len(clear),
        "sha256": hashlib.sha256(clear).hexdigest(),
    }
    path.write_text(json.dumps(kept, indent=1))


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
def test_files_are_read_without_the_kernel_and_rewrapped_ones_by_it(alice: Person, key_bytes: int) -> None:
    with vault(alice, OLD.signature, key_bytes=key_bytes) as files:
        clear = make(alice, files.upper)
        files.unmount()
        before = {name: (files.lower / name).read_bytes() for name in clear}
        for name in ("empty", "one", "extent", "hole") if key_bytes == 16 else ("one",):
            keep(f"{name}-{key_bytes}", files.lower / name, clear[name])
        assert {name: cat(alice, files.lower / name) for name in clear} == clear
        result = run(alice, "rewrap", "-r", files.lower, "--from", OLD.signature, "--to", NEW.signature, "--yes")
        assert (result.code, result.err) == (0, "")
        for name, data in before.items():
            path = files.lower / name
            assert signatures(path) == [NEW.signature]
            assert path.read_bytes()[MAX_HEADER:] == data[MAX_HEADER:]
            assert path.read_bytes()[:26] == data[:26]
        assert {name: cat(alice, files.lower / name) for name in clear} == clear
        strike_out(alice, OLD)
        try:
            files.remount(NEW.signature)
            for name in clear:
                assert answered(alice, opening(files.upper / name)).value == clear[name]
            do_as(alice, lambda: [(files.upper / name).open("ab").write(b"more") for name in clear] and None)
            files.remount()
            for name in clear:
                assert answered(alice, opening(files.upper / name)).value == clear[name] + b"more"
        finally:
            enrol(alice, OLD)


def test_with_both_keys_kept_either_one_opens_the_file(alice: Person) -> None:
    with vault(alice, OLD.signature) as files:
        path = files.fill(1)[0]
        files.unmount()
        lower = files.lower / path.name
        assert run(alice, "rewrap", lower, "--to", NEW.signature, "--keep", "--yes").code == 0
        assert signatures(lower) == [OLD.signature, NEW.signature]
        keep("both-16", lower, CONTENT)
        for missing, there in ((OLD, NEW), (NEW, OLD)):
            strike_out(alice, missing)
            try:
                files.remount(there.signature)
                assert answered(alice, opening(path)).value == CONTENT
                files.unmount()
            finally:
                enrol(alice, missing)
        result = run(alice, "rewrap", lower, "--from", OLD.signature, "--to", NEW.signature, "--yes")
        assert (result.code, signatures(lower)) == (0, [NEW.signature])
        files.remount(NEW.signature)
        assert answered(alice, opening(path)).value == CONTENT


def passphrase_token() -> tuple[str, bytes]:
    """Returns signature and payload of struct ecryptfs_auth_tok with a passphrase (include/linux/ecryptfs.h)."""
    made = stretch(MOUNT_PASSPHRASE, SALT)
    token = bytearray(740)
    struct.pack_into("=HH", token, 0, 4, 0)  # version, ECRYPTFS_PASSWORD
    struct.pack_into("=IIIII", token, 628, 0, 10, 65536, 64, 2)  # SHA-512; SESSION_KEY_ENCRYPTION_KEY_SET
    token[648:712] = made.key
    token[712:728] = made.signature.encode()
    token[729:737] = SALT
    return made.signature, bytes(token)


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
def test_files_of_a_passphrase_are_read_and_rewrapped(alice: Person, key_bytes: int, tmp_path: Path) -> None:
    signature, token = passphrase_token()
    assert signature == "d395309aaad4de06"
    secret = alice.home / f"mount-passphrase-{key_bytes}"

    def enter() -> int:
        secret.write_bytes(MOUNT_PASSPHRASE)
        secret.chmod(0o600)
        return keyring.add_user_key(signature, token)

    serial = do_as(alice, enter)
    try:
        with vault(alice, signature, key_bytes=key_bytes) as files:
            clear = make(alice, files.upper)
            files.unmount()
            keep(f"passphrase-{key_bytes}", files.lower / "one", clear["one"])
            assert isinstance(
                take_header((files.lower / "one").read_bytes()[:MAX_HEADER]).packets[0], PassphrasePacket
            )
            for name in clear:
                assert cat(alice, files.lower / name, "--passphrase-file", secret) == clear[name]
            options = ("-r", files.lower, "--to", NEW.signature, "--yes")
            result = run(alice, "rewrap", *options, "--passphrase-file", secret)
            assert (result.code, result.err) == (0, "")
            do_as(alice, lambda: keyring.unlink(serial))
            files.remount(NEW.signature)
            for name in clear:
                assert answered(alice, opening(files.upper / name)).value == clear[name]
            files.unmount()
            for name in clear:
                assert isinstance(
                    take_header((files.lower / name).read_bytes()[:MAX_HEADER]).packets[0], PublicKeyPacket
                )
                assert cat(alice, files.lower / name) == clear[name]
    finally:
        do_as(alice, lambda: secret.unlink())


@pytest.fixture
def ext4(alice: Person) -> Iterator[Path]:
    """A filesystem with attributes, which tmpfs of this kernel has not."""
    image, point = Path("/tmp/ring3/rewrap.img"), Path("/tmp/ring3/rewrap.ext4")
    image.parent.mkdir(parents=True, exist_ok=True)
    point.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(32 << 20)
    for command in (["modprobe", "loop"], ["modprobe", "ext4"], ["mkfs.ext4", "-q", str(image)]):
        subprocess.run(command, check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        os.chown(point, alice.uid, alice.gid)
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
        image.unlink()


def test_headers_in_attributes_are_rewrapped(alice: Person, ext4: Path) -> None:
    lower, upper = ext4 / "lower", Path("/tmp/ring3/rewrap.upper")

    def mounted(signature: str) -> None:
        mount(alice, lower, upper, f"{signature},ecryptfs_xattr_metadata")

    mounted(OLD.signature)
    clear = make(alice, upper)
    unmount(upper)
    keep("xattr-16", lower / "one", clear["one"])
    before = {name: (lower / name).read_bytes() for name in clear}
    assert {name: cat(alice, lower / name) for name in clear} == clear
    result = run(alice, "rewrap", "-r", lower, "--to", NEW.signature, "--yes")
    assert (result.code, result.err) == (0, "")
    assert {name: (lower / name).read_bytes() for name in clear} == before
    assert {name: cat(alice, lower / name) for name in clear} == clear
    strike_out(alice, OLD)
    try:
        mounted(NEW.signature)
        try:
            for name in clear:
                assert answered(alice, opening(upper / name)).value == clear[name]
        finally:
            unmount(upper)
    finally:
        enrol(alice, OLD)


def test_a_mounted_folder_is_refused_and_with_mounted_files_in_use_are_left_alone(alice: Person) -> None:
    with vault(alice, OLD.signature) as files:
        paths = files.cold(2)
        options = ("rewrap", "-r", files.lower, "--to", NEW.signature, "--yes")
        refused = run(alice, *options)
        assert refused.code == os.EX_USAGE
        assert f"{files.lower}: eCryptfs has {files.lower} mounted at {files.upper}" in refused.err
        above = run(alice, "rewrap", "-r", files.lower.parent, "--to", NEW.signature, "--yes")
        assert above.code == os.EX_TEMPFAIL
        assert f"{files.lower}: eCryptfs has it mounted at {files.upper}" in above.err
        clear = run(alice, "rewrap", "-r", files.upper, "--to", NEW.signature, "--yes")
        assert clear.code == os.EX_USAGE
        assert f"give the lower folder, {files.lower}" in clear.err
        assert [signatures(files.lower / path.name) for path in paths] == [[OLD.signature]] * 2


def test_an_open_file_above_is_left_alone(alice: Person) -> None:
    with vault(alice, OLD.signature) as files:
        first, second = files.cold(2)
        ready, go = os.pipe()

        def hold() -> bytes:
            with first.open("rb") as file:
                os.write(go, b"x")
                signal.pause()
                return file.read()

        holder = Task(alice, hold)
        try:
            os.read(ready, 1)
            result = run(alice, "rewrap", "-r", files.lower, "--to", NEW.signature, "--yes", "--mounted")
        finally:
            holder.end(signal.SIGKILL)
            os.close(ready)
            os.close(go)
        assert result.code == os.EX_TEMPFAIL
        assert f"{files.lower / first.name}: is open in another process, or in eCryptfs above" in result.err
        assert signatures(files.lower / first.name) == [OLD.signature]
        assert signatures(files.lower / second.name) == [NEW.signature]
        files.remount()
        for path in (first, second):
            assert answered(alice, opening(path)).value == CONTENT


# --- killed ---------------------------------------------------------------------------------------------------

FILES, KILLS, SIZE = 1000, 50, 5000
AT_A_TIME = 40  # files that a run manages, about, before it is killed
MEASURED = 200  # files


@pytest.mark.long
@pytest.mark.time_limit(7200)
def test_killed_at_random_moments_every_file_is_read_by_the_kernel(alice: Person) -> None:
    """Of 1,000 files, those whose header has changed are read by the kernel after each kill; at the end, all.

    A run that ends before its moment is followed by one in the other direction."""
    chance = random.Random(20261128)
    with vault(alice, OLD.signature) as files:
        clear = fill(alice, files, FILES)
        names = [*clear]
        data = {name: digest(files.lower / name) for name in names}
        known = headers(files, names)
        rate = rewrapping(alice, files, names[:AT_A_TIME])
        print(f"{rate:.1f} files/s", flush=True)
        source, target = OLD.signature, NEW.signature
        kills = finished = changed_in_all = 0
        while kills < KILLS:
            command = ("rewrap", "-r", str(files.lower), "--from", source, "--to", target, "--yes")
            running = Task(alice, lambda command=command: _main(command))  # type: ignore[misc]
            time.sleep(chance.uniform(0, 2 * AT_A_TIME / rate))  # the moment at which it is killed: no synchronisation
            if running.ended:
                assert running.result() == 0
                finished += 1
                source, target = target, source
            else:
                running.end(signal.SIGKILL)
                kills += 1
            now = headers(files, names)
            changed = [name for name in names if now[name] != known[name]]
            known, changed_in_all = now, changed_in_all + len(changed)
            for name in changed:
                (packet,) = take_header(now[name]).packets
                assert packet.signature in (source, target)
            assert read_by_the_kernel(alice, files, changed) == {name: clear[name] for name in changed}
            print(f"{kills} kills, {finished} runs that ended, {changed_in_all} headers changed", flush=True)
        result = run(alice, "rewrap", "-r", files.lower, "--to", target, "--from", source, "--yes")
        assert result.code == 0, result.err
        assert {name: signatures(files.lower / name) for name in names} == {name: [target] for name in names}
        assert read_by_the_kernel(alice, files, names) == clear
        assert {name: digest(files.lower / name) for name in names} == data
        assert changed_in_all > KILLS


@pytest.mark.long
def test_files_a_second_of_rewrapping_and_of_copying_are_printed(alice: Person) -> None:
    """Nothing is compared: on a busy machine the figures say little."""
    with vault(alice, OLD.signature) as files:
        names = [*fill(alice, files, MEASURED)]
        rate = rewrapping(alice, files, names)
        other = copying(alice, files, names)
        print(f"{MEASURED} files: rewrapping {rate:.1f} files/s, copying {other:.1f} files/s")
        assert [signatures(files.lower / name) for name in names] == [[NEW.signature]] * MEASURED


def fill(who: Person, files: Vault, count: int) -> dict[str, bytes]:
    """Makes files, and unmounts; returns what they hold."""
    clear = {f"file-{number}": random.Random(number).randbytes(SIZE) for number in range(count)}

    def work() -> None:
        for name, data in clear.items():
            write(files.upper / name, data)

    do_as(who, work, patience=1200)
    files.unmount()
    return clear


def digest(path: Path) -> bytes:
    """Of the file's encrypted data."""
    return hashlib.sha256(path.read_bytes()[2 * MAX_HEADER :]).digest()


def rewrapping(who: Person, files: Vault, names: list[str]) -> float:
    """Rewraps these files; returns how many it manages in a second."""
    paths = [files.lower / name for name in names]
    result = run(who, "rewrap", *paths, "--to", NEW.signature, "--yes", "--json")
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.out)
    assert report["counts"]["rewrapped"] == len(names)
    return len(names) / float(report["seconds"])


def copying(who: Person, files: Vault, names: list[str]) -> float:
    """Copies the files through two mounts, as one does without rewrap; returns how many in a second."""
    files.remount(OLD.signature)
    other = Vault(who, NEW.signature)
    other.mount()

    def work() -> float:
        started = time.monotonic()
        for name in names:
            write(other.upper / name, patiently((files.upper / name).read_bytes))
            with (other.upper / name).open("rb") as file:
                os.fsync(file.fileno())
        return len(names) / (time.monotonic() - started)

    try:
        return do_as(who, work, patience=1200)
    finally:
        other.unmount()
        files.unmount()


def _main(command: tuple[str, ...]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(["ecryptfs", *command])
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def headers(files: Vault, names: list[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        with (files.lower / name).open("rb") as file:
            found[name] = file.read(MAX_HEADER)
    return found


def patiently(work: Callable[[], T]) -> T:
    """Does something with a file, until it works. On a busy machine the broker gives requests up, as it must, and
    those that follow are refused until the daemon has finished the one that was late."""
    results: list[T] = []

    def works() -> bool:
        try:
            results.append(work())
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOTCONN):
                raise
        return bool(results)

    wait_until(works, "the file")
    return results[0]


def read_by_the_kernel(who: Person, files: Vault, names: list[str]) -> dict[str, bytes]:
    if not names:
        return {}
    files.remount()
    try:
        return do_as(who, lambda: {name: patiently((files.upper / name).read_bytes) for name in names}, patience=1200)
    finally:
        files.unmount()
