"""Provides CIFS mounts, files in them, and who answers the kernel (upcall or its peer, cifs.upcall)."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kernel.scene import Gate, Outcome, attempt, begin
from upcall.handler import Handler
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.messages import Instance, pack_instance, take_instance
from upcall.testing.lab.fileserver import FileServer, mount_here, mounted, request_key_lines, unmount_soon
from upcall.testing.lab.kerberos import FILE_SERVER
from upcall.testing.lab.stage import Person, Task, broker_status, person
from upcall.wire.envelope import Envelope

SERVICE = "cifs.spnego"

_numbers = itertools.count()


def mountpoint() -> Path:
    """Returns a new mount point."""
    return Path(f"/tmp/ring3/cifs-{next(_numbers)}")


def mount_of(who: Person, *options: str) -> tuple[str, ...]:
    """Returns the options of an encrypted mount with this user's ticket."""
    return ("seal", f"user={who.name}", f"cruid={who.uid}", *options)


@contextlib.contextmanager
def mount_for(who: Person) -> Iterator[Path]:
    """An encrypted mount with one session, this user's, for all users."""
    with mounted(mountpoint(), *mount_of(who, f"uid={who.uid}", f"gid={who.gid}")) as folder:
        yield folder


@contextlib.contextmanager
def shared_mount(first: Person) -> Iterator[Path]:
    """An encrypted mount with a session per user; the first one is that of `first`."""
    with mounted(mountpoint(), *mount_of(first, "multiuser")) as folder:
        yield folder


def begin_mounting(who: Person, *options: str, host: str = FILE_SERVER) -> Task[Outcome]:
    """Attempts to mount as root for this user; unmounts again."""

    def work() -> None:
        folder = mountpoint()
        mount_here(folder, *mount_of(who, *options), host=host)
        unmount_soon(folder)

    return begin(person("root"), work)


def mounting(who: Person, *options: str, host: str = FILE_SERVER) -> Outcome:
    return begin_mounting(who, *options, host=host).result()


def writing(folder: Path, who: Person, name: str = "file") -> Callable[[], object]:
    """Writes a file as this user, and reads it."""

    def work() -> str:
        path = folder / who.name / name
        path.write_text(f"by {who.name}\n")
        return path.read_text()

    return work


def try_again(who: Person, work: Callable[[], object]) -> Outcome:
    """After a refusal on a shared mount.

    The kernel refuses whoever was refused less than a second ago, and each such try begins that second anew
    (TLINK_ERROR_EXPIRE in fs/cifs/connect.c): asking all the time would mean being refused for ever.
    """
    time.sleep(1.1)
    return attempt(who, work)


def owner(share: FileServer, who: Person, name: str = "file") -> int:
    """Returns the file's owner on the server."""
    return (share.files / who.name / name).stat().st_uid


def sessions() -> dict[int, str]:
    """Returns the kernel's sessions with servers: uid -> "encrypted", "signed" or ""."""
    text = Path("/proc/fs/cifs/DebugData").read_text()
    return {int(uid): how for how, uid in re.findall(r"SessionId: \S+ ?(\w*)\n.*Cred User: (\d+)", text)}


def session_numbers() -> set[str]:
    """Returns the sessions' ids of the server: a new session has another one."""
    return set(re.findall(r"SessionId: (\S+)", Path("/proc/fs/cifs/DebugData").read_text()))


# --- answering the kernel -----------------------------------------------------------------------------------


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Installs the line of `upcall request-key install`, and no other."""
    with request_key_lines(f"create cifs.spnego * * {' '.join(forwarder.command())} %k"):
        yield


def spnego() -> Handler:
    """Imports and returns the handler, in the daemon."""
    from upcall_spnego import handler

    return handler


def counts() -> Counter[str]:
    """Returns outcome -> number of the kernel's upcalls, as counted by the broker."""
    return Counter((broker_status() or {}).get("request_key", {}))


class Blocking:
    """The real handler; waits for the gate first."""

    services: tuple[str, ...] = (SERVICE,)

    def __init__(self, gate: Gate) -> None:
        self._gate, self._real = gate, spnego()

    def lane(self, envelope: Envelope, /) -> str:
        return self._real.lane(envelope)

    def answer(self, envelope: Envelope, /) -> bytes:
        self._gate.wait()
        return self._real.answer(envelope)


class Lying:
    """The real handler, with its payloads changed by `lie` after the daemon's own checks."""

    services: tuple[str, ...] = (SERVICE,)

    def __init__(self, lie: Callable[[bytes], bytes]) -> None:
        self._lie, self._real = lie, spnego()

    def lane(self, envelope: Envelope, /) -> str:
        return self._real.lane(envelope)

    def answer(self, envelope: Envelope, /) -> bytes:
        instance = take_instance(self._real.answer(envelope))
        return pack_instance(Instance(instance.expiry, self._lie(instance.payload)))
