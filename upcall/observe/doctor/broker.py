"""Checks the broker: that it runs and answers, and that its folder and sockets have the right owners and modes."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from upcall import __version__
from upcall.core.errors import UsageError
from upcall.kernel import procfs
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.process.paths import SYSTEM_FOLDER
from upcall.protocols.ecryptfs.device import DEVICE
from upcall.protocols.request_key.install.system import SOCKET

UNIT = "upcall-broker.service"


def start_command(scene: Scene) -> str:
    """Returns the command that starts a broker in the examined folder."""
    service = scene.service_command("start", UNIT) if scene.folder is None else ""
    return service or f"upcall broker{scene.runtime_option()} &"


def running(scene: Scene) -> Iterator[Finding]:
    """Checks that the broker runs, is not stopped, answers, and has this version."""
    said, path = scene.broker, scene.place.socket
    if not said.pid:
        who = "" if scene.uid == 0 or scene.folder else "start one of your own, or have root start the system's"
        yield problem(f"no broker at {path}: {said.why}", who or "start it", start_command(scene))
    elif procfs.state(said.pid) in ("T", "t"):
        yield problem(f"the broker (pid {said.pid}) is stopped", "continue it", f"kill -CONT {said.pid}")
    elif said.status is None:
        yield problem(f"the broker (pid {said.pid}) does not answer: {said.why}", "look at its log, and restart it")
    else:
        yield ok(f"the broker (pid {said.pid}) answers")
        yield from _version(said.pid, said.status["broker"].get("version"))


def _version(pid: int, version: object) -> Iterator[Finding]:
    if version != __version__:
        it = f"the broker (pid {pid}) is of version {version or 'unknown'}, this is {__version__}"
        yield problem(it, "restart it: it still runs the version that was installed when it started")


def device(scene: Scene) -> Iterator[Finding]:
    """Checks that the broker serves /dev/ecryptfs."""
    status = scene.broker.status
    if status is None:
        return
    for one in status.get("devices", []):
        if one["open"]:
            yield ok(f"eCryptfs is served for uid {one['uid']}")
        elif not scene.at(str(DEVICE)).exists():
            yield note(f"eCryptfs is not served for uid {one['uid']}: there is no {DEVICE}")
        else:
            holder = _holder(scene, one["uid"])
            who = f"pid {holder} ({scene.text(f'/proc/{holder}/comm').strip()!r}) has it open" if holder else ""
            what = f"eCryptfs is not served for uid {one['uid']}: {one['why']}"
            yield problem(
                what, who or "as root this shows which process has it open", f"kill {holder}" if holder else ""
            )
    if "ecryptfs" not in status["broker"]["sources"] and status["broker"]["uid"] == 0:
        yield note("the broker does not serve eCryptfs", "start it with --ecryptfs, if it should")


def _holder(scene: Scene, uid: int) -> int:
    """Returns the pid of a process of this uid that has the device open; 0 if none is found or visible."""
    for process in scene.at("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == uid and any(
                str(fd.readlink()) == str(DEVICE) for fd in (process / "fd").iterdir()
            ):
                return int(process.name)
        except OSError:
            continue  # it has ended, or is not accessible
    return 0


def folder(scene: Scene) -> Iterator[Finding]:
    """Checks owners and modes of the folder and the sockets in it."""
    try:
        place = scene.place
    except UsageError as error:
        yield problem(str(error), "move it away: it is created again")
        return
    if not place.folder.exists():
        yield note(f"{place.folder} is not there: no broker has run here since the machine was booted")
        return
    owner = scene.broker.uid if scene.broker.pid else place.folder.stat().st_uid
    found = [
        *_faults(place.folder, owner, 0o755, forbidden=0o022, needed=0),
        *_faults(place.socket, owner, 0o666, forbidden=0, needed=0o666 if owner == 0 else 0o600),
        *_faults(place.request_key_socket, 0, 0o600, forbidden=0o077, needed=0),
        *_faults(place.source_socket, owner, 0o600, forbidden=0o077, needed=0),
        *_faults(place.registration_socket, owner, 0o666, forbidden=0, needed=0o666 if owner == 0 else 0o600),
    ]
    yield from found or [ok(f"{place.folder}: owners and modes are right")]


def _faults(path: Path, owner: int, mode: int, forbidden: int, needed: int) -> Iterator[Finding]:
    try:
        found = path.lstat()
    except OSError:
        return  # other checks report missing files
    if found.st_uid != owner:
        what = f"{path} belongs to uid {found.st_uid}, not to uid {owner}"
        yield problem(what, "change its owner", f"chown {owner} {quote(str(path))}")
    bits = stat.S_IMODE(found.st_mode)
    if bits & forbidden or bits & needed != needed:
        why = "others can get at it" if bits & forbidden else "others cannot reach it"
        yield problem(f"{path} has mode {bits:04o}: {why}", "", f"chmod {mode:04o} {quote(str(path))}")


def forwarders(scene: Scene) -> Iterator[Finding]:
    """Checks that the forwarder finds root's broker."""
    path = scene.place.request_key_socket if scene.folder else Path(SOCKET)
    if path.exists():
        yield ok(f"{path} takes the kernel's requests for keys")
    elif scene.place.folder == SYSTEM_FOLDER or scene.broker.uid == 0:
        why = f"{path} is not there: root's broker does not run, or has lost its socket"
        yield note(why, "restart root's broker, if it is to answer the kernel's requests for keys")
