"""Runs `upcall lab ecryptfs` in the guest: three users' files on the real kernel's eCryptfs.

Set up as on a real system: `upcall broker`, one `upcall daemon` per user, keys by `upcall key generate`.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from upcall.core.errors import UpcallError
from upcall.keys.store import KeyStore
from upcall.observe.status import show
from upcall.process import start_python as startpython
from upcall.protocols.ecryptfs.device import DEVICE
from upcall.testing.lab import stage
from upcall.testing.lab.console import Failed, complain, console, must, say
from upcall.testing.lab.stage import Person, Task

T = TypeVar("T")
NAMES = ("root", "alice", "bob")
_IN_HAND = 4  # pending requests of alice's daemon when it is killed
_PATIENCE = 10.0  # seconds until it has them: the kernel gives each up after 3
_TRIES = 10


class Vault:
    """One user's files. `lower`: folder with ciphertext. `upper`: the eCryptfs mount."""

    def __init__(self, who: Person, signature: str, files: int) -> None:
        self.who, self.signature = who, signature
        self.lower, self.upper = Path(f"/tmp/{who.name}/lower"), Path(f"/tmp/{who.name}/upper")  # noqa: S108
        self.contents = {f"file-{number}": secrets.token_bytes(200 + number % 8000) for number in range(files)}

    def mount(self) -> None:
        stage.mount(self.who, self.lower, self.upper, self.signature)

    def remount(self) -> None:
        stage.unmount(self.upper)  # eCryptfs's inodes, and the files' keys in them, are gone with it
        self.mount()

    def write(self) -> float:
        """Writes all files. Returns the seconds."""
        start = time.monotonic()
        for name, content in self.contents.items():
            _unless_given_up(self.upper / name, partial(_write, content))
        return time.monotonic() - start

    def read(self) -> float:
        """Reads all files. Returns the seconds. Failed unless the content is as written."""
        start = time.monotonic()
        for name, content in self.contents.items():
            found = _unless_given_up(self.upper / name, Path.read_bytes)
            must(found == content, f"{self.upper / name} came back different")
        return time.monotonic() - start

    def check_ciphertext(self) -> None:
        for name, content in self.contents.items():
            must(content[:64] not in (self.lower / name).read_bytes(), f"{self.lower / name} holds clear text")


def _write(content: bytes, path: Path) -> int:
    return path.write_bytes(content)


def _unless_given_up(path: Path, work: Callable[[Path], T]) -> T:
    """Does it to a file, ten times at most: eCryptfs waits for 3 s, which a busy emulated processor may exceed."""
    for _ in range(_TRIES - 1):
        try:
            return work(path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
    return work(path)


# --- the acts ------------------------------------------------------------------------------------------------


def make_keys(people: Sequence[Person], bits: int) -> None:
    """Runs `upcall key generate` for all users in parallel, each with the passphrase in a file of that user."""
    running = [_make_key(who, bits) for who in people]
    for who, process in zip(people, running, strict=True):
        _, complaints = process.communicate(timeout=2 * stage.PATIENCE)
        must(process.returncode == 0, f"the key of {who.name}: {complaints}")


def _make_key(who: Person, bits: int) -> subprocess.Popen[str]:
    file = who.home / "passphrase"
    file.touch(0o600)
    file.write_text(secrets.token_hex(16))
    os.chown(file, who.uid, who.gid)
    return subprocess.Popen(
        startpython.command("upcall", "key", "generate", f"--bits={bits}", f"--passphrase-file={file}"),
        user=who.uid,
        group=who.gid,
        extra_groups=[],
        env=who.environment(),
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def create_and_read(vaults: Sequence[Vault]) -> None:
    total = sum(len(vault.contents) for vault in vaults)
    start = time.monotonic()
    all_of([Task(vault.who, vault.write) for vault in vaults])
    span = time.monotonic() - start
    say(f"{total} files created by {len(vaults)} people at once: {total / span:.0f}/s")
    for vault in vaults:
        vault.check_ciphertext()
        vault.remount()
    say("unmounted and mounted again: only ciphertext is left below")
    start = time.monotonic()
    all_of([Task(vault.who, vault.read) for vault in vaults])
    span = time.monotonic() - start
    say(f"{total} files read back by {len(vaults)} people at once, all equal: {total / span:.0f}/s")


def all_of(tasks: Sequence[Task[float]]) -> None:
    for task in tasks:
        task.result(2 * stage.PATIENCE)


class OpenResult(NamedTuple):
    errno: int
    seconds: float


def opening(who: Person, path: Path) -> Task[OpenResult]:
    def work() -> OpenResult:
        start, code = time.monotonic(), 0
        try:
            path.read_bytes()
        except OSError as error:
            code = error.errno or -1
        return OpenResult(code, time.monotonic() - start)

    return Task(who, work)


def kill_a_daemon(daemon: subprocess.Popen[bytes], alices: Vault, bobs: Vault) -> bool:
    """Kills alice's daemon with pending requests. Checks that these are refused for that reason, and that bob's files
    work meanwhile. False if the machine was so busy that some requests timed out before."""
    before = daemon_gone()
    for vault in (alices, bobs):
        vault.remount()
    daemon.send_signal(signal.SIGSTOP)
    paths = [alices.upper / name for name in list(alices.contents)[:_IN_HAND]]
    tasks = [opening(alices.who, path) for path in paths]
    try:
        stage.wait_until(lambda: stage.pending(alices.who.uid) == len(tasks), "alice's requests", _PATIENCE)
        pending = True
    except TimeoutError:
        pending = False
    others = [opening(bobs.who, bobs.upper / name).result() for name in list(bobs.contents)[:_IN_HAND]]
    must(all(one.errno == 0 for one in others), f"bob was affected: {others}")
    daemon.kill()
    killed = time.monotonic()
    refused = [task.result() for task in tasks]
    span = time.monotonic() - killed
    must(all(one.errno == errno.EIO for one in refused), f"alice's were not refused: {refused}")
    because = daemon_gone() - before
    daemon.wait()
    without = opening(alices.who, paths[0]).result()
    must(without.errno == errno.EIO, f"without a daemon: {without}")
    if not pending or because != len(tasks):
        return False
    say(f"alice's daemon is stopped; {len(tasks)} of her processes open files and wait for it")
    say(f"bob, meanwhile: {len(others)} files, {max(one.seconds for one in others) * 1000:.0f} ms at most")
    say(f"alice's daemon is killed: all {len(refused)} refused {span * 1000:.0f} ms later; the kernel alone takes 3 s")
    say(f"without a daemon her next file is refused in {without.seconds * 1000:.0f} ms")
    return True


def daemon_gone() -> int:
    """Returns the number of requests that the broker has refused because their daemon had ended."""
    outcomes = (stage.broker_status() or {}).get("outcomes", {}).get("ecryptfs", {})
    return int(outcomes.get("daemon-gone", 0))


def run(files: int, bits: int, log: int) -> None:
    started = time.monotonic()
    people = [stage.person(name) for name in NAMES]
    running = [stage.start_broker(log)]
    vaults: list[Vault] = []
    try:
        say(f"the broker serves {DEVICE} (kernel {os.uname().release})")
        make_keys(people, bits)
        say(f"an RSA-{bits} key each for {', '.join(NAMES)}, its auth token in the user's keyring")
        running += stage.start_daemons(*people, stderr=log)
        say("a daemon each, with the user's own rights")
        for who in people:
            signature = stage.do_as(who, lambda: KeyStore().load("default").signature)
            vaults.append(Vault(who, signature, files))
            vaults[-1].mount()
        say("an eCryptfs mount each")
        create_and_read(vaults)
        alices = running[1 + NAMES.index("alice")]
        for _ in range(_TRIES):
            was_seen = kill_a_daemon(alices, vaults[1], vaults[2])
            alices = stage.start_daemon(people[1], log)
            running.append(alices)
            if was_seen:
                break
        else:
            raise Failed("the machine is too busy: requests were given up before their daemon was killed")
        all_of([Task(vault.who, vault.read) for vault in vaults])
        say("a new daemon for alice: everybody's files are read once more, all equal")
        show(stage.broker_status() or {}, console)
    finally:
        for vault in vaults:
            stage.unmount(vault.upper)
        for process in reversed(running):
            stage.end(process)
    faults = stage.kernel_faults()
    must(not faults, f"the kernel complains: {faults}")
    say(f"the kernel's log is clean; {time.monotonic() - started:.0f} s")


def main(arguments: Sequence[str]) -> int:
    """Runs the demonstration. `arguments`: number of files per user, size of keys in bits. Logs go to /results."""
    log = os.open("/results/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        run(int(arguments[0]), int(arguments[1]), log)
    except (UpcallError, OSError, subprocess.SubprocessError) as error:
        complain(error)
        return os.EX_SOFTWARE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
