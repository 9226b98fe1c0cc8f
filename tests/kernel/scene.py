"""Provides keys, files on eCryptfs, and attempts with errno and duration, for tests on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upcall_rsa import module as openssl
from upcall_rsa.blob import Blob, pack_blob

from upcall.daemon.passphrase_sources import fetch
from upcall.handler import Handler
from upcall.kernel import keyring
from upcall.keymodule import KeyModule
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.testing.lab import stage
from upcall.testing.lab.stage import (
    PATIENCE,
    Person,
    Task,
    broker_status,
    do_as,
    fork_broker,
    fork_daemon,
    mount,
    unmount,
    wait_until,
)

VECTORS = Path(__file__).parent.parent / "vectors"
CONTENT = b"what only its owner may read\n"


class Key(NamedTuple):
    """Returns a key of tests/vectors/keys.json."""

    name: str
    bits: int
    signature: str
    pem: str


PASSPHRASE = b"labpass"


@functools.cache
def keys() -> dict[str, Key]:
    told = json.loads((VECTORS / "keys.json").read_text())["keys"]
    return {name: Key(name, key["bits"], key["signature"], key["pem"]) for name, key in told.items()}


def enrol(who: Person, key: Key, source: str | None = None) -> None:
    """Writes the key's file into the user's home, and adds its auth token to the user keyring.

    `source` as in the blob: None leaves the passphrase in the token, as ecryptfs-utils does.
    """

    def work() -> None:
        path = who.home / f"{key.name}.pem"
        if not path.exists():
            path.touch(0o600)
            path.write_text(key.pem)
        blob = pack_blob(Blob(str(path), source, PASSPHRASE if source is None else b""))
        keyring.add_user_key(key.signature, pack_auth_tok(AuthTok(key.signature, "openssl", blob)))

    do_as(who, work)


def strike_out(who: Person, key: Key) -> None:
    """Unlinks the auth token from the user keyring, if it is there."""

    def work() -> None:
        serial = keyring.find(key.signature)
        if serial is not None:
            keyring.unlink(serial)

    do_as(who, work)


def key_service(module: Callable[[], KeyModule] = lambda: openssl, prove_all: bool = False) -> KeyHandler:
    """Returns the handler of a daemon with this key module only, under the alias that the auth tokens name."""
    return KeyHandler(keyring, {"openssl": module}, fetch, prove_all)


# --- attempts ------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The result of an attempt: errno (0: success), duration, returned value."""

    errno: int
    seconds: float
    value: object

    def __repr__(self) -> str:
        return f"<{errno.errorcode.get(self.errno, 'ok')} after {self.seconds:.2f} s>"


def begin(who: Person, work: Callable[[], object]) -> Task[Outcome]:
    """Starts an attempt in a child."""

    def timed() -> Outcome:
        start = time.monotonic()
        try:
            value = work()
        except OSError as error:
            return Outcome(error.errno or -1, time.monotonic() - start, None)
        return Outcome(0, time.monotonic() - start, value)

    return Task(who, timed)


def attempt(who: Person, work: Callable[[], object]) -> Outcome:
    return begin(who, work).result()


def opening(path: Path) -> Callable[[], object]:
    """Opens an existing file, and reads it."""
    return path.read_bytes


def creating(path: Path, content: bytes = CONTENT) -> Callable[[], object]:
    return lambda: path.write_bytes(content)


# --- files ---------------------------------------------------------------------------------------------------

_numbers = itertools.count()


class Vault:
    """A user's eCryptfs mount: ciphertext in `lower`, plain files in `upper`."""

    def __init__(self, who: Person, *signatures: str, key_bytes: int = 16) -> None:
        self.who, self.signatures, self.key_bytes = who, signatures, key_bytes
        folder = Path(f"/tmp/ring3/{next(_numbers)}")
        self.lower, self.upper = folder / "lower", folder / "upper"
        self.is_mounted = False

    def mount(self) -> None:
        mount(self.who, self.lower, self.upper, *self.signatures, key_bytes=self.key_bytes)
        self.is_mounted = True

    def unmount(self) -> None:
        """Unmounts. Retries while processes still use it: a killed one ends with the kernel's time-out."""
        if self.is_mounted:
            wait_until(self._unmount, f"unmounting {self.upper}")
            self.is_mounted = False

    def _unmount(self) -> bool:
        try:
            unmount(self.upper)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def remount(self, *signatures: str) -> None:
        """Drops the kernel's caches: every open from now on makes a request."""
        self.unmount()  # eCryptfs's inodes, and the files' keys in them, are gone with it
        self.signatures = signatures or self.signatures
        self.mount()

    def fill(self, count: int) -> list[Path]:
        """Makes files as their owner, all with CONTENT."""
        paths = [self.upper / f"file-{number}" for number in range(count)]

        def work() -> None:
            for path in paths:
                _written(path)

        do_as(self.who, work)
        return paths

    def cold(self, count: int) -> list[Path]:
        """As `make`; the next open of each makes a request."""
        paths = self.fill(count)
        self.remount()
        return paths


def _written(path: Path) -> None:
    """Makes a file; not what a test is about. An emulated processor may be so busy that eCryptfs gives up."""
    for _ in range(5):
        try:
            path.write_bytes(CONTENT)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        else:
            return
    path.write_bytes(CONTENT)


@contextlib.contextmanager
def vault(who: Person, *signatures: str, key_bytes: int = 16) -> Iterator[Vault]:
    made = Vault(who, *signatures, key_bytes=key_bytes)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()


def results(tasks: Sequence[Task[Outcome]], patience: float = PATIENCE) -> list[Outcome]:
    """Returns the results of started attempts, in their order."""
    return [task.result(patience) for task in tasks]


def lower_names(vault: Vault) -> list[str]:
    return sorted(os.listdir(vault.lower))


# --- broker and daemons of one test --------------------------------------------------------------------------


class House:
    """A broker and daemons, forked from the test, with their logs."""

    def __init__(self) -> None:
        self.folder = Path(f"/tmp/ring3/{next(_numbers)}")
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o1777)
        self.broker: Task[None] | None = None
        self.others: list[Task[object]] = []

    def open(self) -> Task[None]:
        """Starts the broker; again if it has ended."""
        self.broker = fork_broker(self.folder / "broker.log")
        return self.broker

    def daemon(self, who: Person, handler: Callable[[], Handler] = key_service) -> Task[None]:
        task = fork_daemon(who, handler, self.folder / f"{who.name}.log")
        self.others.append(task)  # type: ignore[arg-type]
        return task

    def run(self, who: Person, work: Callable[[], object]) -> Task[object]:
        """Registers another process that must end with the test."""
        task = Task(who, work, output=self.folder / f"{who.name}.log")
        self.others.append(task)
        return task

    def log(self, name: str = "broker") -> str:
        return (self.folder / f"{name}.log").read_text()

    def gate(self) -> Gate:
        return Gate(self.folder / f"gate-{next(_numbers)}")

    def close(self) -> None:
        for task in reversed(self.others):
            task.end()
        if self.broker is not None:
            self.broker.end()


class Gate:
    """A gate, closed until it is opened; works across processes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        self._path.touch()

    @property
    def is_open(self) -> bool:
        return self._path.exists()

    def wait(self, patience: float = 60.0) -> None:
        wait_until(self._path.exists, "the gate", patience)


def pending(who: Person) -> int:
    """Returns the number of this uid's pending requests."""
    return stage.pending(who.uid)


def waiting(who: Person, paths: Sequence[Path]) -> list[Task[Outcome]]:
    """Starts attempts to open these, and waits until all are pending. On a busy machine the first can time out before
    the last has started: then all are started again."""
    tasks = [begin(who, opening(path)) for path in paths]
    wait_until(lambda: pending(who) == len(tasks) or any(task.ended for task in tasks), "requests")
    if pending(who) == len(tasks):
        return tasks
    results(tasks)
    return waiting(who, paths)


def daemon_status(who: Person) -> dict[str, Any]:
    return stage.daemon_status(who.uid)


def outcome_counts() -> dict[str, int]:
    """Returns outcome -> number of the kernel's requests."""
    outcomes: Any = (broker_status() or {}).get("outcomes", {})
    return dict(outcomes.get("ecryptfs", {}))


def answered(who: Person, work: Callable[[], object]) -> Outcome:
    """Repeats the attempt until the daemon has answered, five times at most: on a busy machine requests time
    out in the broker."""
    for _ in range(5):
        before = outcome_counts().get("timed-out", 0)
        outcome = attempt(who, work)
        if outcome_counts().get("timed-out", 0) == before:
            break
    return outcome


@contextlib.contextmanager
def nothing_given_up() -> Iterator[None]:
    """Disables the broker's time-out, which ends before the kernel's, to show that other requests do not wait for the
    ones that hang."""
    before = outcome_counts().get("timed-out", 0)
    yield
    assert outcome_counts().get("timed-out", 0) == before


def kernel_counts() -> dict[str, int]:
    counts: Any = (broker_status() or {}).get("kernel", {})
    return dict(counts)
