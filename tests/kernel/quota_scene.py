"""Provides a filesystem in a file, limits, and daemons that record their notices, for tests of real quotas."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from upcall.broker.server import main as serve_broker
from upcall.broker.settings import BrokerSettings
from upcall.config import SYSTEM
from upcall.core.errors import ModuleFailed
from upcall.kernel import quotactl
from upcall.kernel.mounts import mounts
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.ecryptfs.device import DEVICE
from upcall.protocols.ecryptfs.packets import (
    CIPHER_AES_256,
    STATUS_OK,
    TAG_66,
    TAG_67,
    Ask,
    FileKey,
    Reply,
    pack_ask,
    pack_file_key,
    pack_reply,
)
from upcall.protocols.quota.notice import QuotaNotice, sentence, take
from upcall.protocols.quota.process import main as serve_quota
from upcall.protocols.quota.settings import SourceSettings
from upcall.protocols.quota.setup import STATE
from upcall.protocols.quota.warning import Quota
from upcall.testing.lab.stage import PATIENCE, Person, Task, broker_status, daemon_status, do_as, wait_until
from upcall.wire.envelope import Envelope

MB = 1 << 20
STAFF, PROJECT = 7000, 77
NAMES = {STAFF: "quota-staff", PROJECT: "quota-project"}
GRACE = 8  # seconds: a slow machine must not miss the half of it

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
interval = 1
near-interval = 1
settle = 1
digest-after = 100
"""


def run(command: str | Sequence[str]) -> None:
    words = command.split() if isinstance(command, str) else command
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


class Disk:
    """A filesystem with user, group and project quota, in a file in the guest's memory."""

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

    def used(self, uid: int) -> int:
        """Returns the usage in bytes, as the kernel counts it now."""
        with quotactl.Filesystem(str(self.point), "") as filesystem:
            return filesystem.get(quotactl.USER, uid).space.used

    def close(self) -> None:
        run(["umount", str(self.point)])
        self.image.unlink()  # the guest's memory holds ten of them


def give_names() -> None:
    """Adds names of the group and the project to the guest's /etc."""
    for file, line in (("group", f"{NAMES[STAFF]}:x:{STAFF}:"), ("projid", f"{NAMES[PROJECT]}:{PROJECT}")):
        path = Path("/etc", file)
        before = path.read_text() if path.exists() else ""
        if line not in before.splitlines():
            path.write_text(f"{before}{line}\n")


@contextlib.contextmanager
def disk(kind: str, folder: Path) -> Iterator[Disk]:
    made = Disk(kind, folder)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def reachable_disk(kind: str, tmp_path: Path) -> Iterator[Disk]:
    """Makes a folder in pytest's, accessible to the users who write there."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    with disk(kind, tmp_path) as made:
        yield made


class Listening:
    """A handler that records its notices in a file."""

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


class Answering(Listening):
    """Answers requests, too: every wrap returns the same."""

    ASK = pack_ask(Ask(TAG_66, "0" * 16, pack_file_key(FileKey(CIPHER_AES_256, bytes(32)))))
    REPLY = pack_reply(Reply(TAG_67, STATUS_OK, b"w" * 64))
    services = ("quota", "key")

    def answer(self, _: Envelope) -> bytes:
        return self.REPLY


class QuotaHouse:
    """The system's broker, its quota source, and daemons whose notices are recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o1777)
        SYSTEM.parent.mkdir(exist_ok=True)
        SYSTEM.write_text(CONFIG)
        self.broker: Task[None] | None = None
        self.source: Task[None] | None = None
        self._tasks: list[Task[None]] = []

    def open(self, root: Person) -> None:
        """Starts what is not running, and waits until the source is connected to the broker."""
        if self.broker is None or self.broker.ended:
            self.broker = Task(
                root, lambda: serve_broker(BrokerSettings(device=DEVICE)), output=self.folder / "broker.log"
            )
            self._tasks.append(self.broker)
        if self.source is None or self.source.ended:
            self.source = Task(root, lambda: serve_quota(SourceSettings()), output=self.folder / "source.log")
            self._tasks.append(self.source)
        wait_until(lambda: bool((broker_status() or {}).get("quota", {}).get("listening")), "the source listens")

    @contextlib.contextmanager
    def source_stopped(self) -> Iterator[None]:
        """Stops the source (SIGSTOP), so that it reads no intermediate figures."""
        assert self.source is not None
        self.source.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.source.send_signal(signal.SIGCONT)

    def kill_source(self) -> None:
        """Kills the source (SIGKILL), so that it cannot save its state."""
        assert self.source is not None
        self.source.end(signal.SIGKILL)

    def kill_broker(self) -> None:
        assert self.broker is not None
        self.broker.end(signal.SIGKILL)

    def end(self) -> None:
        """Ends all, in the order of a shutdown."""
        for task in (self.source, self.broker):
            assert task is not None
            task.end()

    def daemon(self, who: Person, kind: type[Listening] = Listening) -> None:
        from upcall.daemon.process import Daemon, serve

        handler = kind(self.folder / f"{who.name}.told")
        place = Place(SYSTEM_FOLDER)
        task = Task(who, lambda: serve(Daemon(place, [handler])), output=self.folder / f"{who.name}.log")
        self._tasks.append(task)
        wait_until(lambda: daemon_status(who.uid).get("pid") == task.pid, f"the daemon of {who.name}", 2 * PATIENCE)

    def told(self, who: Person) -> list[QuotaNotice]:
        try:
            return [take(line) for line in (self.folder / f"{who.name}.told").read_bytes().splitlines()]
        except FileNotFoundError:
            return []

    def events(self, who: Person) -> list[str]:
        """Returns the events but "near", which depends on the moment at which the source reads."""
        return [notice.event for notice in self.told(who) if notice.event != "near"]

    def wait(self, who: Person, event: str, times: int = 1) -> QuotaNotice:
        """Waits until this user has had this number of notices of the event. Returns the last one."""

        def log() -> str:
            return "".join((self.folder / f"{name}.log").read_text() for name in ("broker", "source"))

        try:
            wait_until(lambda: [one.event for one in self.told(who)].count(event) >= times, event, 2 * PATIENCE)
        except TimeoutError:
            found = f"{who.name} was told {self.told(who)}, not {event}; {status()}; {kernel_says()}; {log()}"
            raise AssertionError(found) from None
        return [notice for notice in self.told(who) if notice.event == event][-1]

    def close(self) -> None:
        for task in reversed(self._tasks):
            task.end()
        SYSTEM.unlink(missing_ok=True)
        STATE.unlink(missing_ok=True)


def status() -> dict[str, Any]:
    found: dict[str, Any] = (broker_status() or {}).get("quota", {})
    return found


def kernel_says() -> dict[str, list[Quota]]:
    """Returns the figures of all ids with a limit, by filesystem and kind."""
    found: dict[str, list[Quota]] = {}
    for mount, kinds in quotactl.with_quotas(mounts()).items():
        with quotactl.opened(mount) as filesystem:
            for kind in kinds:
                following, mine = 1, found.setdefault(f"{mount.point}, kind {kind}", [])
                while (one := filesystem.next(kind, following)) is not None:
                    mine.append(one)
                    following = one.id + 1
    return found


def is_registered(who: Person) -> bool:
    return bool(daemon_status(who.uid))


def levels(uid: int) -> list[float]:
    """Returns the source's saved state of this user's quotas."""
    try:
        states = json.loads(STATE.read_text())["states"]
    except FileNotFoundError:
        return []
    return [level for _, kind, number, _, level, *_ in states if (kind, number) == (quotactl.USER, uid)]


def quiet() -> None:
    """Waits until the source has read all quotas three times: to see a usage below the limit, to confirm it, and to
    deliver the notice."""

    def readings() -> int:
        return int(status().get("readings", 0))

    before = readings()
    wait_until(lambda: readings() > before + 3, "the source reads all quotas", 2 * PATIENCE)


def reads(notice: QuotaNotice, who: Person, *words: str) -> None:
    """Asserts that the notice, put into words for this user, contains these words."""
    text = sentence(notice, notice.at, who.uid)
    assert all(one in text for one in words), text


def writing(path: Path, size: int) -> Callable[[], int]:
    """Returns work that writes this number of bytes, or as many as fit, and returns the errno."""

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


def try_to_write(who: Person, path: Path, size: int) -> int:
    """As `fill`, and removes the file: XFS keeps preallocated space beyond a growing file's end for minutes."""

    def work() -> int:
        try:
            return writing(path, size)()
        finally:
            path.unlink(missing_ok=True)

    return do_as(who, work)


def remove(who: Person, path: Path) -> None:
    do_as(who, path.unlink)


NO_ROOM = (errno.EDQUOT, errno.ENOSPC)  # XFS says the latter for projects
