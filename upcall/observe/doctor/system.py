"""Gives checks access to the system: this machine, or a played one below a folder. Asks each process once."""

from __future__ import annotations

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from upcall.core.errors import PeerError, Refused, UsageError, error_words
from upcall.process import trust
from upcall.process.connection import LocalConnection
from upcall.process.paths import Place, daemon_socket, find_place
from upcall.protocols.request_key.install.system import System

PATIENCE = 1.0  # seconds, the time-out of a broker's or daemon's answer


class StatusAnswer(NamedTuple):
    """The status of a process behind a socket. `pid`, `uid`: from the kernel; 0 and -1 if none listens. `why`: the
    reason why there is no status."""

    pid: int = 0
    uid: int = -1
    status: dict[str, Any] | None = None
    why: str = ""


INIT_SCRIPTS = ("/etc/init.d/upcall-broker", "/etc/init.d/upcall")  # of the package, and of `upcall setup`


class Scene:
    """The system to examine. `folder`: the broker's; None: the usual one. `root`: above request-key's configuration.
    `machine`: above /proc, /dev and so on."""

    def __init__(self, folder: Path | None = None, root: Path = Path("/"), machine: Path = Path("/")) -> None:
        self.folder, self.system, self._machine = folder, System(root), machine
        self.uid = os.geteuid()

    def at(self, path: str) -> Path:
        """Returns a path of the machine's."""
        return self._machine / path.lstrip("/")

    def has_unit(self, kind: str, name: str) -> bool:
        """Returns whether systemd has this unit. `kind`: "system" or "user"."""
        return any(self.at(f"{folder}/systemd/{kind}/{name}").exists() for folder in ("/etc", "/usr/lib", "/lib"))

    def service_command(self, verb: str, unit: str) -> str:
        """Returns the command by which root starts or stops a service of the system's: by systemd, or, where that does
        not run, by the init script, which has all services in one. "" if neither has it."""
        if script := self.init_script():
            return f"{script} {verb}"
        return f"systemctl {verb} {unit}" if self.has_unit("system", unit) else ""

    def init_script(self) -> str:
        """Returns the init script of upcall's services, where systemd does not run; otherwise ""."""
        if self.at("/run/systemd/system").is_dir():
            return ""
        return next((script for script in INIT_SCRIPTS if self.at(script).exists()), "")

    def text(self, path: str) -> str:
        """Returns the content of a file of the machine's; empty if it is missing or not readable."""
        try:
            return self.at(path).read_text("utf-8", "replace")
        except OSError:
            return ""

    @functools.cached_property
    def faults(self) -> list[trust.Fault]:
        """What other users could change of all code that this interpreter can run."""
        return trust.faults(deep=True)

    @functools.cached_property
    def place(self) -> Place:
        """The broker's folder. UsageError if this user's runtime folder is not safe."""
        return find_place(self.folder)

    @functools.cached_property
    def broker(self) -> StatusAnswer:
        """The broker's status. UsageError as `place`."""
        return _asked(self.place.socket, frozenset({0, self.uid}), "broker.status")

    @functools.cached_property
    def daemon(self) -> StatusAnswer:
        """The daemon's status. UsageError as `place`."""
        return _asked(daemon_socket(create=False), frozenset({self.uid}), "daemon.status")

    def runtime_option(self) -> str:
        """Returns the option by which a command finds the same broker, with a leading blank; or ""."""
        return "" if self.folder is None else f" --runtime {shlex.quote(str(self.folder.absolute()))}"

    def root_option(self) -> str:
        """Returns the option by which `upcall request-key` examines the same system, with a leading blank; or ""."""
        return "" if self.system.root == Path("/") else f" --root {shlex.quote(str(self.system.root))}"


def _asked(path: Path, owners: frozenset[int], service: str) -> StatusAnswer:
    try:
        connection = LocalConnection(path, owners)
    except (OSError, UsageError) as error:
        return StatusAnswer(why=error_words(error))
    try:
        pid, uid = connection.peer
        try:
            # LocalConnection waits a second longer than the deadline that it sends.
            status = json.loads(connection.ask(service, os.geteuid(), b"", PATIENCE - 1))
        except TimeoutError:
            return StatusAnswer(pid, uid, why=f"no answer within {PATIENCE:g} s")
        except (OSError, Refused, PeerError, ValueError) as error:
            return StatusAnswer(pid, uid, why=error_words(error))
    finally:
        connection.close()
    return (
        StatusAnswer(pid, uid, status)
        if isinstance(status, dict)
        else StatusAnswer(pid, uid, why="its status is no JSON object")
    )
