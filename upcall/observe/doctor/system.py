"""What the checks look at: this machine, or a played one below a folder; each process is asked once."""

from __future__ import annotations

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from upcall.core.errors import PeerError, Refused, UsageError
from upcall.process import trust
from upcall.process.connection import LocalConnection
from upcall.process.paths import Place, daemon_socket, find_place
from upcall.protocols.request_key.install.system import System

PATIENCE = 1.0  # seconds in which a broker or a daemon that is well has answered


class StatusAnswer(NamedTuple):
    """What the process behind a socket said of itself. `pid` and `uid` are the kernel's words; 0 and -1 if nobody
    listens. `why`: there is no status because of this."""

    pid: int = 0
    uid: int = -1
    status: dict[str, Any] | None = None
    why: str = ""


class Scene:
    """`folder`: the broker's. `root`: below it is request-key's configuration; `machine`: /proc, /dev and so on."""

    def __init__(self, folder: Path | None = None, root: Path = Path("/"), machine: Path = Path("/")) -> None:
        self.folder, self.system, self._machine = folder, System(root), machine
        self.uid = os.geteuid()

    def at(self, path: str) -> Path:
        """A path of the machine's."""
        return self._machine / path.lstrip("/")

    def has_unit(self, kind: str, name: str) -> bool:
        """Whether systemd has this unit; `kind`: "system" or "user"."""
        return any(self.at(f"{folder}/systemd/{kind}/{name}").exists() for folder in ("/etc", "/usr/lib", "/lib"))

    def text(self, path: str) -> str:
        """What stands in a file of the machine's; nothing if it is not there or not ours to read."""
        try:
            return self.at(path).read_text("utf-8", "replace")
        except OSError:
            return ""

    @functools.cached_property
    def faults(self) -> list[trust.Fault]:
        """What others could change of all that this interpreter can run."""
        return trust.faults(deep=True)

    @functools.cached_property
    def place(self) -> Place:
        """UsageError if this user's runtime folder is not sound."""
        return find_place(self.folder)

    @functools.cached_property
    def broker(self) -> StatusAnswer:
        """UsageError as `place`."""
        return _asked(self.place.socket, frozenset({0, self.uid}), "broker.status")

    @functools.cached_property
    def daemon(self) -> StatusAnswer:
        """UsageError as `place`."""
        return _asked(daemon_socket(), frozenset({self.uid}), "daemon.status")

    def runtime_option(self) -> str:
        """What a command needs to find the same broker."""
        return "" if self.folder is None else f" --runtime {shlex.quote(str(self.folder.absolute()))}"

    def root_option(self) -> str:
        """What `upcall request-key` needs to look at the same system."""
        return "" if self.system.root == Path("/") else f" --root {shlex.quote(str(self.system.root))}"


def _asked(path: Path, owners: frozenset[int], service: str) -> StatusAnswer:
    try:
        connection = LocalConnection(path, owners)
    except (OSError, UsageError) as error:
        return StatusAnswer(why=f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error))
    try:
        pid, uid = connection.peer
        try:
            # A second is what a connection waits beyond the deadline that it tells the other side.
            status = json.loads(connection.ask(service, os.geteuid(), b"", PATIENCE - 1))
        except TimeoutError:
            return StatusAnswer(pid, uid, why=f"has said nothing within {PATIENCE:g} s")
        except (OSError, Refused, PeerError, ValueError) as error:
            return StatusAnswer(pid, uid, why=str(error))
    finally:
        connection.close()
    return (
        StatusAnswer(pid, uid, status)
        if isinstance(status, dict)
        else StatusAnswer(pid, uid, why="its status is no JSON object")
    )
