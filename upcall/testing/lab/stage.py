"""Sets up users with daemons, keys and eCryptfs mounts in the lab's guest, for demonstrations and tests.

Runs as the guest's root, partly in forked children with another user's credentials and keyrings, which belong to
processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import pwd
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from upcall.client import Client, NoBroker
from upcall.core.errors import UpcallError
from upcall.handler import Handler
from upcall.kernel import keyring, libc
from upcall.process import start_python as startpython
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.ecryptfs.device import DEVICE
from upcall.testing.lab import kernellog

T = TypeVar("T")

PATIENCE = 180.0  # seconds: time-out for events in a guest that is emulated on a busy machine


class Person(NamedTuple):
    """A user of the guest."""

    name: str
    uid: int
    gid: int
    home: Path

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "PATH": os.environ.get("PATH", ""),
            "LANG": "C.UTF-8",
            "XDG_RUNTIME_DIR": f"/run/user/{self.uid}",
        }


def person(name: str) -> Person:
    """Returns a user by name, and creates the runtime folder that a login would create."""
    entry = pwd.getpwnam(name)
    folder = Path(f"/run/user/{entry.pw_uid}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return Person(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


class ChildFailed(UpcallError):
    """A forked child raised an exception, or was killed. The text is its traceback."""


class Task(Generic[T]):
    """A forked child that runs a function with a user's ids and keyrings.

    `output`: a file for its stderr. By fork without exec: starting Python takes seconds in the guest.
    """

    def __init__(
        self, who: Person, work: Callable[[], T], *, keep_root: bool = False, output: Path | None = None
    ) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _run_in_child(writer, lambda: _in_place_of(who, work, keep_root, output))
        os.close(writer)
        self._reader = reader
        self._pidfd = os.pidfd_open(self.pid)
        self._outcome: object = None

    def __repr__(self) -> str:
        return f"<Task {self.pid}>"

    def fileno(self) -> int:
        """Returns a descriptor that is readable once the child has ended. Only before `result` was called."""
        return self._pidfd

    @property
    def ended(self) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], 0)[0])

    def send_signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def result(self, patience: float = PATIENCE) -> T:
        """Waits for the function's end, and returns its result. Raises its OSError; ChildFailed for other exceptions;
        TimeoutError after `patience` seconds."""
        if self._pidfd >= 0:
            self._outcome = self._collect(time.monotonic() + patience)
        if isinstance(self._outcome, OSError | ChildFailed):
            raise self._outcome
        return self._outcome  # type: ignore[return-value]

    def _collect(self, deadline: float) -> object:
        data = b""
        while chunk := self._read(deadline):
            data += chunk
        os.close(self._reader)
        os.close(self._pidfd)
        self._pidfd = -1
        _, status = os.waitpid(self.pid, 0)
        if not data:
            return ChildFailed(f"{self!r} ended with {os.waitstatus_to_exitcode(status)}")
        return pickle.loads(data)  # noqa: S301 - written by our own child

    def _read(self, deadline: float) -> bytes:
        if not select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"{self!r} goes on")
        return os.read(self._reader, 1 << 16)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal, and SIGKILL if the child does not end within a few seconds."""
        if self._pidfd < 0:
            return
        self.send_signal(number)
        self.send_signal(signal.SIGCONT)
        with contextlib.suppress(OSError, ChildFailed):  # TimeoutError is an OSError
            self.result(5)
        if self._pidfd >= 0:
            self.send_signal(signal.SIGKILL)
            with contextlib.suppress(OSError, ChildFailed):
                self.result()


def _run_in_child(writer: int, work: Callable[[], object]) -> NoReturn:
    """Runs the function in the child and ends it: the child must never return into the parent's code."""
    try:
        result = work()
    except OSError as error:
        result = error
    except BaseException:  # noqa: BLE001 - passed to the parent as text
        result = ChildFailed(traceback.format_exc())
    try:
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
    finally:
        os._exit(0)


def _in_place_of(who: Person, work: Callable[[], T], keep_root: bool, output: Path | None) -> T:
    if output is not None:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
    _become(who, keep_root)
    return work()


def do_as(who: Person, work: Callable[[], T], *, keep_root: bool = False, patience: float = 300.0) -> T:
    """Runs a function in a child with this user's ids and keyrings. Returns its result, as `Task.result`."""
    return Task(who, work, keep_root=keep_root).result(patience)


def _become(who: Person, keep_root: bool) -> None:
    """Changes to the user's ids and keyrings. `keep_root`: the effective uid stays 0, as in a set-uid mount helper."""
    os.environ.update(who.environment())
    os.setgroups([])
    os.setresgid(who.gid, 0 if keep_root else who.gid, 0 if keep_root else who.gid)
    os.setresuid(who.uid, 0 if keep_root else who.uid, 0 if keep_root else who.uid)
    keyring.join_session_and_link_user_keyring()


def wait_until(true: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Polls a condition, with increasing pauses, until it is true. TimeoutError after `patience` seconds. `what`: the
    condition, for the error."""
    start, pause = time.monotonic(), 0.01
    while not true():
        if time.monotonic() - start > patience:
            raise TimeoutError(f"{what}: not within {patience} s")
        time.sleep(pause)
        pause = min(0.1, pause * 1.1)  # polling slows down what is waited for


# --- broker and daemons --------------------------------------------------------------------------------------


def start_broker(stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Starts the system's broker by `upcall broker`, and waits until it is ready. `stderr`: a descriptor for its
    log."""
    process = subprocess.Popen(startpython.command("upcall", "broker"), stderr=stderr)
    with _killed_unless_ready(process.kill):
        wait_until(lambda: broker_status() is not None, "the broker", 2 * PATIENCE)
    return process


def start_daemon(who: Person, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Starts this user's daemon by `upcall daemon`, and waits until it is registered and its device is open."""
    return start_daemons(who, stderr=stderr)[0]


def start_daemons(*people: Person, stderr: int | None = None) -> list[subprocess.Popen[bytes]]:
    """Starts a daemon for each user, in parallel, and waits for all."""
    with contextlib.ExitStack() as on_failure:
        started = []
        for who in people:
            process = subprocess.Popen(
                startpython.command("upcall", "daemon"),
                user=who.uid,
                group=who.gid,
                extra_groups=[],
                env=who.environment(),
                cwd="/",
                stderr=stderr,
            )
            on_failure.callback(process.kill)
            started.append(process)
        for who, process in zip(people, started, strict=True):
            wait_until(functools.partial(_serves, who, process.pid), f"the daemon of {who.name}", 2 * PATIENCE)
        on_failure.pop_all()
    return started


def _serves(who: Person, pid: int) -> bool:
    return serving(who.uid) == pid


def fork_broker(output: Path | None = None) -> Task[None]:
    """Starts the broker by fork, which is faster. Waits until it is ready."""
    from upcall.broker.server import main
    from upcall.broker.settings import BrokerSettings

    task = Task(person("root"), lambda: main(BrokerSettings(device=DEVICE)), output=output)
    with _killed_unless_ready(task.end):
        wait_until(lambda: task.ended or broker_pid() == task.pid, "the broker")
    return task


def fork_daemon(who: Person, handler: Callable[[], Handler], output: Path | None = None) -> Task[None]:
    """Starts a daemon by fork, with a handler that the child makes. Waits until its device is open."""
    from upcall.daemon.process import Daemon, serve

    task = Task(who, lambda: serve(Daemon(Place(SYSTEM_FOLDER), [handler()])), output=output)
    with _killed_unless_ready(task.end):
        wait_until(lambda: task.ended or serving(who.uid) == task.pid, f"the daemon of {who.name}")
    return task


@contextlib.contextmanager
def _killed_unless_ready(kill: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        kill()
        raise


def broker_status() -> dict[str, Any] | None:
    """Returns the broker's status; None without a broker."""
    try:
        with Client(SYSTEM_FOLDER) as client:
            return client.status()
    except (NoBroker, TimeoutError):
        return None


def broker_pid() -> int | None:
    status = broker_status()
    return status["broker"]["pid"] if status else None


def daemon_status(uid: int) -> dict[str, Any]:
    """Returns the broker's status of a uid's daemon; {} without one."""
    daemons = (broker_status() or {}).get("daemons", [])
    return next((daemon for daemon in daemons if daemon["uid"] == uid), {})


def pending(uid: int) -> int:
    """Returns the number of pending requests of a uid's daemon."""
    return len(daemon_status(uid).get("pending", []))


def serving(uid: int) -> int | None:
    """Returns the pid of the registered daemon of a uid whose device is open (if this kernel has the device); None
    without one."""
    status = broker_status()
    if status is None:
        return None
    if DEVICE.exists() and not any(device["uid"] == uid and device["open"] for device in status.get("devices", [])):
        return None
    return next((daemon["pid"] for daemon in status["daemons"] if daemon["uid"] == uid), None)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process by SIGTERM, and by SIGKILL if it has not ended within a few seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- mounts --------------------------------------------------------------------------------------------------


def mount(who: Person, lower: Path, upper: Path, *signatures: str, key_bytes: int = 16) -> None:
    """Mounts eCryptfs as this user, whose user keyring has the auth tokens. OSError of mount(2)."""
    options = ",".join(
        [f"ecryptfs_sig={one}" for one in signatures] + ["ecryptfs_cipher=aes", f"ecryptfs_key_bytes={key_bytes}"]
    )
    for folder in (lower, upper):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, who.uid, who.gid)
    do_as(who, lambda: _mount(str(lower), str(upper), options), keep_root=True)


def _mount(lower: str, upper: str, options: str) -> None:
    flags = 2 | 4  # MS_NOSUID | MS_NODEV
    libc.call("mount", lower.encode(), upper.encode(), b"ecryptfs", flags, options.encode(), about=upper)


def unmount(upper: Path) -> None:
    libc.call("umount2", str(upper).encode(), 0, about=str(upper))


def drop_caches() -> None:
    """Drops pages, dentries and inodes, so that the next open reads the lower file.

    Three times, because recently used inodes of eCryptfs survive the first time.
    """
    os.sync()
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


@contextlib.contextmanager
def mounted(who: Person, lower: Path, upper: Path, *signatures: str, key_bytes: int = 16) -> Iterator[Path]:
    """A context with an eCryptfs mount, which is unmounted at its end."""
    mount(who, lower, upper, *signatures, key_bytes=key_bytes)
    try:
        yield upper
    finally:
        unmount(upper)


def kernel_faults() -> list[str]:
    """Returns the lines of the kernel's log that report a fault of the kernel."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    raw = b""
    try:
        while True:
            try:
                raw += os.read(log, 8192)  # one record each
            except BlockingIOError:
                return kernellog.faults(raw)
            except BrokenPipeError:
                continue  # EPIPE: records were overwritten; reading continues with the oldest
    finally:
        os.close(log)
