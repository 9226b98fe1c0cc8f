"""Inside the lab's guest: people with daemons, keys and eCryptfs mounts of their own, for demonstrations and tests.

Everything here is done by root in the guest, partly in forked children that take another person's place: credentials
and keyrings belong to processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import pwd
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from upcall.client import Client, NoBroker
from upcall.errors import UpcallError
from upcall.kernel import keyring
from upcall.runtime import SYSTEM_FOLDER

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
PATIENCE = 20.0  # seconds for anything to become true in a slow guest


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
    """A user by name, with a runtime folder as a login would have made it."""
    entry = pwd.getpwnam(name)
    folder = Path(f"/run/user/{entry.pw_uid}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return Person(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


class ChildFailed(UpcallError):
    """A forked child raised; the text is its traceback."""


def fork_as(who: Person, work: Callable[[], object]) -> int:
    """Starts `work` in a child with this person's ids and keyrings; gives its pid. Its exit code is 1 if it raised."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(who, keep_root=False)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a child must not return into the parent's code
        traceback.print_exc()
    os._exit(code)


def do_as(who: Person, work: Callable[[], T], *, keep_root: bool = False) -> T:
    """Does it in a child with this person's ids and keyrings, and gives its result. ChildFailed, or the OSError."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become(who, keep_root)
            result: object = work()
        except OSError as error:
            result = error
        except BaseException:  # noqa: BLE001 - see fork_as
            result = ChildFailed(traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    outcome = pickle.loads(data)  # noqa: S301 - our own child wrote it
    if isinstance(outcome, OSError | ChildFailed):
        raise outcome
    return outcome  # type: ignore[no-any-return]


def _become(who: Person, keep_root: bool) -> None:
    """`keep_root`: the real uid is the person's, the effective one stays 0: what a mount helper looks like."""
    os.environ.update(who.environment())
    os.setgroups([])
    os.setresgid(who.gid, 0 if keep_root else who.gid, 0 if keep_root else who.gid)
    os.setresuid(who.uid, 0 if keep_root else who.uid, 0 if keep_root else who.uid)
    keyring.join_session_and_link_user_keyring()


def wait_until(true: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Looks every few milliseconds. TimeoutError names what did not come true."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {patience} s")
        time.sleep(0.01)


# --- broker and daemons --------------------------------------------------------------------------------------


def start_broker() -> subprocess.Popen[bytes]:
    """The system's broker, ready for daemons."""
    process = subprocess.Popen([sys.executable, "-P", "-m", "upcall", "broker"])
    try:
        wait_until(lambda: broker_status() is not None, "the broker")
    except BaseException:
        process.kill()
        raise
    return process


def start_daemon(who: Person, *options: str) -> subprocess.Popen[bytes]:
    """This person's daemon, registered, its device open."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "upcall", "daemon", *options],
        user=who.uid,
        group=who.gid,
        extra_groups=[],
        env=who.environment(),
        cwd="/",
    )
    try:
        wait_until(lambda: serving(who.uid) == process.pid, f"the daemon of {who.name}")
    except BaseException:
        process.kill()
        raise
    return process


def broker_status() -> dict[str, object] | None:
    """The broker's status, or None while there is none."""
    try:
        with Client(SYSTEM_FOLDER) as client:
            return client.status()
    except (NoBroker, TimeoutError):
        return None


def serving(uid: int) -> int | None:
    """The pid of the daemon that is registered for a uid and has its device open."""
    status = broker_status() or {"daemons": [], "devices": []}
    daemons, devices = status["daemons"], status["devices"]
    if not isinstance(daemons, list) or not isinstance(devices, list):
        return None
    if not any(device["uid"] == uid and device["open"] for device in devices):
        return None
    return next((daemon["pid"] for daemon in daemons if daemon["uid"] == uid), None)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if that does not help within a few seconds."""
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
    """An eCryptfs mount by this person, whose user keyring holds the auth tokens. OSError as mount(2)."""
    options = ",".join(
        [f"ecryptfs_sig={one}" for one in signatures] + ["ecryptfs_cipher=aes", f"ecryptfs_key_bytes={key_bytes}"]
    )
    for folder in (lower, upper):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, who.uid, who.gid)
    do_as(who, lambda: _mount(str(lower), str(upper), options), keep_root=True)


def _mount(lower: str, upper: str, options: str) -> None:
    flags = 2 | 4  # MS_NOSUID | MS_NODEV
    if _libc.mount(lower.encode(), upper.encode(), b"ecryptfs", flags, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), upper)


def unmount(upper: Path) -> None:
    if _libc.umount2(str(upper).encode(), 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(upper))


def drop_caches() -> None:
    """Pages, dentries and inodes: what is opened next is read from the lower file."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


@contextlib.contextmanager
def mounted(who: Person, lower: Path, upper: Path, *signatures: str) -> Iterator[Path]:
    """The same, unmounted at the end."""
    mount(who, lower, upper, *signatures)
    try:
        yield upper
    finally:
        unmount(upper)


def kernel_faults() -> list[str]:
    """The lines of the kernel's log that speak of a bug."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True, timeout=20).stdout
    words = (
        "BUG:",
        "kernel BUG",
        "Oops",
        "list_add corruption",
        "list_del corruption",
        "usercopy",
        "general protection",
    )
    return [line for line in log.splitlines() if any(word in line for word in words)]
