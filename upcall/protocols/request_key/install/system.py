"""Reads request-key's configuration from this machine or from a system image, and checks the files it depends on."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from upcall.process.trust import distrust
from upcall.protocols.request_key.conf import Line, lines
from upcall.protocols.request_key.install.our_file import FILE, Ours, is_ours, is_upcalls, take

FOLDER: Final = "/etc/request-key.d"
LAST: Final = "/etc/request-key.conf"
REQUEST_KEY: Final = "/sbin/request-key"  # compiled into the kernel
SOCKET: Final = "/run/upcall/request-key.sock"


class System:
    """A system whose files are below `root`. Paths in arguments, results and messages are relative to `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = Path(os.path.realpath(root))
        # An image may be built without root: files of the building user belong to root later.
        self.owners = {0} if self.root == Path("/") else {0, os.geteuid()}

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def distrust(self, path: str, may_miss: bool = False) -> str:
        """Returns why users other than root could change this program, or "" if they cannot."""
        return distrust(path, self.root, self.owners, may_miss)

    def lines(self, without: str = "") -> list[Line]:
        """Returns all lines in the order in which request-key reads them. `without`: a file to leave out. OSError."""
        return [line for path in self._files() if path != without for line in lines(path, self.at(path).read_bytes())]

    def lines_if(self, data: bytes) -> list[Line]:
        """Returns the lines as if FILE contained `data`. FILE is assumed to be read last of its folder, the worst
        case: the file system determines the order."""
        others = self.lines(without=FILE)
        before = [line for line in others if line.path != LAST]
        return [*before, *lines(FILE, data), *others[len(before) :]]

    def _files(self) -> Iterator[str]:
        """Yields the configuration files in the order of readdir(3). request-key ignores symbolic links."""
        try:
            with os.scandir(self.at(FOLDER)) as entries:
                for entry in entries:
                    name = entry.name
                    if name.endswith(".conf") and name[0] != "." and entry.is_file(follow_symlinks=False):
                        yield f"{FOLDER}/{name}"
        except FileNotFoundError:
            pass
        if self.at(LAST).exists():
            yield LAST

    def ours(self) -> Ours | None:
        """Returns the content of our file; None if there is none. FileExistsError if upcall did not write it, or it
        was edited since."""
        path = self.at(FILE)
        try:
            found = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
        except FileNotFoundError:
            return None
        if not is_ours(data):
            raise FileExistsError(errno.EEXIST, "was not made by upcall: move it away, it is left as it is", FILE)
        ours = take(data)
        if ours is None:
            why = "was edited since upcall made it: move your lines to another file, and remove it"
            raise FileExistsError(errno.EEXIST, why, FILE)
        return ours

    def packaged(self) -> tuple[str, ...]:
        """Returns the key types that Debian's packages have upcall answer. OSError."""
        read = [line for line in self.lines(without=FILE) if is_upcalls(line.path) and len(line.columns) > 1]
        return tuple(dict.fromkeys(line.columns[1].decode(errors="replace") for line in read))

    def request_key(self) -> str:
        """Returns what is wrong with /sbin/request-key, which the kernel starts, or ""."""
        try:
            found = self.at(REQUEST_KEY).stat()
        except OSError as error:
            return "is not there: install keyutils" if error.errno == errno.ENOENT else str(error.strerror)
        runs = stat.S_ISREG(found.st_mode) and found.st_mode & 0o111
        return "" if runs else "is not a program"

    def socket(self) -> str:
        """Returns what is wrong with the broker's socket for forwarders, or ""."""
        try:
            found = self.at(SOCKET).lstat()
        except FileNotFoundError:
            return "is not there: root's broker is not running, or does not answer the kernel's requests for keys"
        except OSError as error:
            return str(error.strerror)
        if not stat.S_ISSOCK(found.st_mode):
            return "is not a socket"
        return "" if found.st_uid in self.owners else f"belongs to uid {found.st_uid}"
