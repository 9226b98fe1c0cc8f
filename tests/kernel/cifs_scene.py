"""What the tests of CIFS share: who answers the kernel (the peer, cifs.upcall, or we), mounts, and files in them."""

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
    """A new one."""
    return Path(f"/tmp/ring3/cifs-{next(_numbers)}")


def mount_of(who: Person, *options: str) -> tuple[str, ...]:
    """The options of a sealed mount for this person, whose ticket it takes."""
    return ("seal", f"user={who.name}", f"cruid={who.uid}", *options)


@contextlib.contextmanager
def mount_for(who: Person) -> Iterator[Path]:
    """A sealed mount on which everybody acts as this person."""
    with mounted(mountpoint(), *mount_of(who, f"uid={who.uid}", f"gid={who.gid}")) as folder:
        yield folder


@contextlib.contextmanager
def shared_mount(first: Person) -> Iterator[Path]:
    """A sealed mount on which everybody acts in their own name; `first` has it made."""
    with mounted(mountpoint(), *mount_of(first, "multiuser")) as folder:
        yield folder


def begin_mounting(who: Person, *options: str, host: str = FILE_SERVER) -> Task[Outcome]:
    """An attempt to mount for this person, by root; what it mounts, it unmounts."""

    def work() -> None:
        folder = mountpoint()
        mount_here(folder, *mount_of(who, *options), host=host)
        unmount_soon(folder)

    return begin(person("root"), work)


def mounting(who: Person, *options: str, host: str = FILE_SERVER) -> Outcome:
    return begin_mounting(who, *options, host=host).result()


def writing(folder: Path, who: Person, name: str = "file") -> Callable[[], object]:
    """Writes a file of this person's, and reads it."""

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
    """Whose it is on the server."""
    return (share.files / who.name / name).stat().st_uid


def sessions() -> dict[int, str]:
    """Whose sessions the kernel has with servers, and what it says of their packets: encrypted, signed, or nothing."""
    text = Path("/proc/fs/cifs/DebugData").read_text()
    return {int(uid): how for how, uid in re.findall(r"SessionId: \S+ ?(\w*)\n.*Cred User: (\d+)", text)}


def session_numbers() -> set[str]:
    """What the server has given them: a session that is made anew has another."""
    return set(re.findall(r"SessionId: (\S+)", Path("/proc/fs/cifs/DebugData").read_text()))


# --- who answers the kernel ----------------------------------------------------------------------------------


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """The line of `upcall request-key install`, and no other."""
    with request_key_lines(f"create cifs.spnego * * {' '.join(forwarder.command())} %k"):
        yield


def spnego() -> Handler:
    """The handler, imported in the daemon."""
    from upcall_spnego import handler

    return handler


def counts() -> Counter[str]:
    """How often the kernel's upcalls ended in what, by the broker's count."""
    return Counter((broker_status() or {}).get("request_key", {}))


class Blocking:
    """The real handler, once the gate is open."""

    services: tuple[str, ...] = (SERVICE,)

    def __init__(self, gate: Gate) -> None:
        self._gate, self._real = gate, spnego()

    def lane(self, envelope: Envelope, /) -> str:
        return self._real.lane(envelope)

    def answer(self, envelope: Envelope, /) -> bytes:
        self._gate.wait()
        return self._real.answer(envelope)


class Lying:
    """The real handler, and what `lie` makes of the payloads. Without the daemon's own checks."""

    services: tuple[str, ...] = (SERVICE,)

    def __init__(self, lie: Callable[[bytes], bytes]) -> None:
        self._lie, self._real = lie, spnego()

    def lane(self, envelope: Envelope, /) -> str:
        return self._real.lane(envelope)

    def answer(self, envelope: Envelope, /) -> bytes:
        instance = take_instance(self._real.answer(envelope))
        return pack_instance(Instance(instance.expiry, self._lie(instance.payload)))
