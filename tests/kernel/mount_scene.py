"""What tests of users' mounts share: the source, and users and attackers who ask it for mounts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from upcall.kernel import libc
from upcall.kernel.local import connect
from upcall.kernel.mounts import Mount, mounts
from upcall.process import start_python as startpython
from upcall.process.paths import SYSTEM_FOLDER
from upcall.protocols.ecryptfs.mounting import client, process
from upcall.protocols.ecryptfs.mounting.messages import MAX_REPLY, MOUNT, MountRequest, pack_request, take_reply
from upcall.protocols.ecryptfs.mounting.process import main
from upcall.protocols.ecryptfs.mounting.settings import MountSettings
from upcall.testing.lab.stage import PATIENCE, Person, Task, person, wait_until

CONFIG = Path("/etc/upcall/config.toml")
SOCKET = SYSTEM_FOLDER / client.SOCKET
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
_SET_DUMPABLE = 4


CREDIT = 300.0  # requests of a user: tests make more in a row than a person does, and faster on a quiet machine


class Answer(NamedTuple):
    """0 and the path, or an exit status and the reason."""

    status: int
    text: str


@contextlib.contextmanager
def source(log: Path, rules: str = 'users = ["alice"]\n') -> Iterator[Task[None]]:
    """The source that mounts, forked from the test; what it logs."""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(f"[mount]\n{rules}")

    def serve() -> None:
        process._BURST = CREDIT
        main(MountSettings())

    task: Task[None] = Task(person("root"), serve, output=log)
    try:
        wait_until(lambda: task.ended or SOCKET.exists(), "the source")
        yield task
    finally:
        task.end()
        print(log.read_text())
        CONFIG.unlink()


def made() -> list[Mount]:
    """The eCryptfs mounts of this mount namespace."""
    return [mount for mount in mounts() if mount.type == "ecryptfs"]


def points() -> list[str]:
    return sorted(mount.point for mount in made())


def take_all_away() -> None:
    for mount in reversed(made()):
        libc.call("umount2", os.fsencode(mount.point), 2)


def folder(path: Path, who: Person, mode: int = 0o700) -> Path:
    """A folder of a user's, made as root."""
    path.mkdir(mode, parents=True, exist_ok=True)
    path.chmod(mode)
    os.chown(path, who.uid, who.gid)
    return path


def be_seen() -> None:
    """What a program that was executed has, and a process that has changed its uid has lost: it can be inspected."""
    libc.call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)


def asked(work: Callable[[], str]) -> Answer:
    """Runs the client's part in this process."""
    be_seen()
    try:
        return Answer(0, work())
    except client.MountRefused as refused:
        return Answer(refused.status, str(refused))


def ask(
    who: Person,
    signature: str,
    lower: Path,
    upper: Path,
    name: str = "private",
    before: Callable[[], object] = lambda: None,
) -> Answer:
    """Has a user's process ask for a mount. `before`: what it does first."""

    def work() -> Answer:
        before()
        return asked(lambda: client.ask_mount(MountRequest(MOUNT, name, (signature,)), lower, upper))

    return Task(who, work).result()


def ask_away(who: Person, upper: Path, name: str = "private", lazy: bool = False) -> Answer:
    return Task(who, lambda: asked(lambda: client.ask_unmount(name, upper, lazy))).result()


def raw(data: bytes, descriptors: Sequence[int]) -> Answer:
    """Sends these bytes and descriptors as they are, from this process. In a user namespace root is 65534."""
    connection = connect(SOCKET, frozenset({0, 65534}))
    with connection:
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(connection, [data], list(descriptors))
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        return reply_of(connection)


def reply_of(connection: socket.socket) -> Answer:
    connection.settimeout(PATIENCE)
    try:
        data = connection.recv(MAX_REPLY)
    except ConnectionResetError:
        data = connection.recv(MAX_REPLY)
    return Answer(*take_reply(data))


def request(signature: str, name: str = "private") -> bytes:
    return pack_request(MountRequest(MOUNT, name, (signature,)))


def unshare(flags: int) -> None:
    libc.call("unshare", ctypes.c_int(flags))


def upcall(who: Person, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user, in the user's home, without a terminal."""
    return subprocess.run(
        startpython.command("upcall", *words),
        user=who.uid,
        group=who.gid,
        extra_groups=[],
        env=who.environment() | more,
        cwd=who.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
