"""A source that mounts, in a process, whose mounts are entries of a file: `python -m tests.played_mounting FOLDER`.

What the kernel would do is played, and it does what the name of the mount says: `hang`, `die`, `fail`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from upcall.kernel import mounting
from upcall.kernel.mounts import Mount
from upcall.process.log import EventLog
from upcall.process.paths import Place, own_place
from upcall.protocols.ecryptfs.mounting.allowed import MountRules
from upcall.protocols.ecryptfs.mounting.messages import Made, MountRequest
from upcall.protocols.ecryptfs.mounting.process import MountProcess
from upcall.protocols.ecryptfs.mounting.requester import MountRequester

DEADLINE = 1.0
_DISK, _STACKED = 1, 2  # ids of other mounts


class PlayedMounting:
    """Implements Mounting for one user, without privileges. `state`: the file with the mounts."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._stacked = state.with_name("stacked")  # holds the point of a mount of root's over, or in, a user's
        self._marks: set[str] = set()
        self._new = ""

    def _made(self) -> dict[str, str]:
        """Returns the sources of mounts by their points."""
        return dict(json.loads(self._state.read_text())) if self._state.exists() else {}

    def _save(self, made: Mapping[str, str]) -> None:
        self._state.write_text(json.dumps(made))

    def enter(self, requester: MountRequester) -> None:
        pass

    def owns_namespace(self) -> bool:
        return True

    def mounts(self) -> Mapping[int, Mount]:
        found = {_DISK: Mount(0, "/", "/", "ext4", "/dev/x", frozenset({"rw"}))}
        for point, source in self._made().items():
            options = frozenset({"rw", "nosuid", "nodev"})
            found[Path(point).stat().st_ino] = Mount(0, "/", point, "ecryptfs", source, options, _DISK)
        if self._stacked.exists():
            found[_STACKED] = Mount(0, "/", self._stacked.read_text(), "tmpfs", "none", frozenset({"rw"}))
        return found

    def is_folder(self, fd: int) -> bool:
        return mounting.is_path_of_folder(fd)

    def mount_id(self, fd: int) -> int:
        return os.fstat(fd).st_ino if self.path(fd) in self._made() else _DISK

    def path(self, fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def parent(self, mount: int) -> int:
        return os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)

    def is_empty(self, folder: int) -> bool:
        return mounting.is_empty(folder)

    def lies_within(self, inner: int, outer: int) -> bool:
        return mounting.lies_within(inner, outer)

    def root(self) -> int:
        return os.open("/", os.O_PATH)

    def open_entry(self, folder: int, name: str) -> int:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)

    def create(self, made: Made, request: MountRequest, lower: int, noexec: bool) -> int:
        if made.name == "hang":
            signal.pause()
        if made.name == "moved":  # while the user could stop this process
            (self._state.parent.parent / "upper-moved" / "file").touch()
        if made.name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if made.name == "fail":
            raise OSError(errno.ENOKEY, "no key")
        self._new = str(made)
        return os.dup(lower)

    def options(self, mount: int) -> frozenset[str]:
        return frozenset() if self._new.endswith(":weak") else frozenset({"nosuid", "nodev"})

    def attach(self, mount: int, upper: int) -> None:
        os.dup2(upper, mount)
        self._save({**self._made(), self.path(upper): self._new})

    def detach(self, mount: int) -> None:
        self._take_away(self.path(mount))

    def expire(self, parent: int, name: str) -> None:
        point = f"{self.path(parent)}/{name}"
        if (Path(point) / "busy").exists():
            raise OSError(errno.EBUSY, "busy")
        if (Path(point) / "stacked").exists():  # by root, just before
            self._stacked.write_text(point)
        marked = point in self._marks
        self._marks.add(point)
        if not marked or self._stacked.exists():
            raise OSError(errno.EAGAIN, "marked")
        self._take_away(point)

    def _take_away(self, point: str) -> None:
        self._save({one: made for one, made in self._made().items() if one != point})


def main(folder: Path) -> None:
    import pwd

    place: Place = own_place(folder)
    allowed = MountRules(tuple(pwd.getpwuid(uid).pw_name for uid in (os.geteuid(), 65534)), 3)
    state = folder / "mounts.json"
    log = EventLog("played-mount")
    process = MountProcess(place, lambda: PlayedMounting(state), lambda: allowed, log=log, deadline=DEADLINE)
    process.heed_signals()
    log("ready")
    process.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
