"""What the tests of real quotas share: a filesystem in a file, limits, daemons that write down what they are told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from upcall.broker.server import main as serve_broker
from upcall.config import SYSTEM
from upcall.errors import ModuleFailed
from upcall.lab.stage import PATIENCE, Person, Task, broker_status, daemon_status, do_as, wait_until
from upcall.runtime import SYSTEM_FOLDER, Place
from upcall.wire.netlink import Envelope
from upcall.wire.quotanotice import QuotaNotice, take

MB = 1 << 20
STAFF, PROJECT = 7000, 77

_GETXATTR, _SETXATTR = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_FSXATTR = struct.Struct("=5I8x")
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT

MAKE = {
    "ext4": (
        64,
        "mkfs.ext4 -q -O quota,project -E quotatype=usrquota:grpquota:prjquota",
        "usrquota,grpquota,prjquota",
    ),
    "xfs": (320, "mkfs.xfs -q", "uquota,gquota,pquota"),
}
CONFIG = """[quota]
interval = 2
near-interval = 1
settle = 1
digest-after = 100
"""


def run(command: str | Sequence[str]) -> None:
    words = command.split() if isinstance(command, str) else command
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


class Disk:
    """A filesystem with all three kinds of quota, over a file in the guest's memory."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.image, self.point = kind, folder / "image", folder / "a disk"
        size, make, options = MAKE[kind]
        for module in ("loop", "quota_v2", kind):
            run(f"modprobe {module}")
        self.point.mkdir()
        self.image.touch()
        os.truncate(self.image, size * MB)
        run([*make.split(), str(self.image)])
        run(["mount", "-o", f"loop,{options}", str(self.image), str(self.point)])
        self.point.chmod(0o1777)
        self._folder("shared", group=STAFF).chmod(0o2777)
        project = self._folder("project")
        project.chmod(0o777)
        fd = os.open(project, os.O_RDONLY)
        try:
            flags, *others = _FSXATTR.unpack(fcntl.ioctl(fd, _GETXATTR, bytes(_FSXATTR.size)))
            fcntl.ioctl(fd, _SETXATTR, _FSXATTR.pack(flags | _INHERIT, *others[:2], PROJECT, others[3]))
        finally:
            os.close(fd)

    def _folder(self, name: str, group: int = 0) -> Path:
        found = self.point / name
        found.mkdir()
        os.chown(found, 0, group)
        return found

    def limit(self, whose: str, number: int, soft: int = 0, hard: int = 0, files: tuple[int, int] = (0, 0)) -> None:
        """`whose`: u, g or P. Sizes in bytes."""
        sizes = [str(one) for one in (soft // 1024, hard // 1024, *files)]
        run(["setquota", f"-{whose}", str(number), *sizes, str(self.point)])

    def grace(self, whose: str, seconds: int) -> None:
        run(["setquota", "-t", f"-{whose}", str(seconds), str(seconds), str(self.point)])

    def close(self) -> None:
        run(["umount", str(self.point)])


@contextlib.contextmanager
def disk(kind: str, folder: Path) -> Iterator[Disk]:
    made = Disk(kind, folder)
    try:
        yield made
    finally:
        made.close()


class Listening:
    """A handler that writes down what it is told."""

    services: tuple[str, ...] = ("quota",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def lane(self, _: Envelope) -> str:
        return "quota"

    def answer(self, _: Envelope) -> bytes:
        raise ModuleFailed("quotas are only told")

    def notice(self, envelope: Envelope) -> None:
        with self._path.open("ab") as file:
            file.write(envelope.body + b"\n")


class QuotaHouse:
    """The system's broker with quotas, and daemons; what they are told is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o1777)
        SYSTEM.parent.mkdir(exist_ok=True)
        SYSTEM.write_text(CONFIG)
        self.broker: Task[None] | None = None
        self._tasks: list[Task[None]] = []

    def open(self, root: Person) -> None:
        self.broker = Task(root, lambda: serve_broker(None, None, None, "yes"), output=self.folder / "broker.log")
        self._tasks.append(self.broker)
        wait_until(lambda: bool((broker_status() or {}).get("quota", {}).get("listening")), "the broker listens", 60)

    def daemon(self, who: Person) -> None:
        from upcall.daemon.process import Daemon, serve

        handler = Listening(self.folder / f"{who.name}.told")
        place = Place(SYSTEM_FOLDER)
        task = Task(who, lambda: serve(Daemon(place, [handler])), output=self.folder / f"{who.name}.log")
        self._tasks.append(task)
        wait_until(lambda: daemon_status(who.uid).get("pid") == task.pid, f"the daemon of {who.name}")

    def told(self, who: Person) -> list[QuotaNotice]:
        try:
            return [take(line) for line in (self.folder / f"{who.name}.told").read_bytes().splitlines()]
        except FileNotFoundError:
            return []

    def events(self, who: Person) -> list[str]:
        """All but "near": whether that is told on the way to a limit depends on when the broker reads."""
        return [notice.event for notice in self.told(who) if notice.event != "near"]

    def wait(self, who: Person, event: str, times: int = 1) -> QuotaNotice:
        """Until this person has been told of the event so often; gives the last of them."""

        def log() -> str:
            return (self.folder / "broker.log").read_text()

        try:
            wait_until(lambda: [one.event for one in self.told(who)].count(event) >= times, event, 2 * PATIENCE)
        except TimeoutError:
            raise AssertionError(f"{who.name} was told {self.told(who)}, not {event}; {status()}; {log()}") from None
        return [notice for notice in self.told(who) if notice.event == event][-1]

    def close(self) -> None:
        for task in reversed(self._tasks):
            task.end()
        SYSTEM.unlink(missing_ok=True)
        Path("/var/lib/upcall/quota.json").unlink(missing_ok=True)


def status() -> dict[str, Any]:
    found: dict[str, Any] = (broker_status() or {}).get("quota", {})
    return found


def quiet(seconds: float = 2.5) -> None:
    """Long enough for the broker to have read all quotas once more: what it has to say it has said then."""
    time.sleep(seconds)


def writing(path: Path, size: int) -> Callable[[], int]:
    """Writes so many bytes, or as many as there is room for; gives the errno."""

    def work() -> int:
        try:
            with path.open("ab", buffering=0) as file:
                for _ in range(size // 65536):
                    file.write(bytes(65536))
                os.fsync(file.fileno())
        except OSError as error:
            return error.errno or -1
        return 0

    return work


def fill(who: Person, path: Path, size: int) -> int:
    return do_as(who, writing(path, size))


def remove(who: Person, path: Path) -> None:
    do_as(who, path.unlink)


NO_ROOM = (errno.EDQUOT, errno.ENOSPC)  # XFS says the latter for projects
