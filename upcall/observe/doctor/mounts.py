"""Checks that users whom the configuration allows to mount can do so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from upcall.config import ConfigError
from upcall.kernel.local import listens
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.protocols.ecryptfs.mounting.allowed import check_allowed, remedy, rules
from upcall.protocols.ecryptfs.mounting.client import SOCKET
from upcall.protocols.ecryptfs.mounting.denied import Denied

UNIT = "upcall-mount.service"


def mounting(scene: Scene) -> Iterator[Finding]:
    """Checks [mount] users, and that the source listens."""
    try:
        allowed = rules()
    except ConfigError:
        return  # the check of the configuration reports it
    runs = _listens(scene.place.folder / SOCKET)
    if not allowed.users:
        if runs:
            yield note("users cannot mount: [mount] users names nobody, and the service runs", "stop it", _stop(scene))
        else:
            yield note("users cannot mount eCryptfs without root", f"the administrator can allow it: {remedy('NAME')}")
        return
    if not runs:
        remedy_ = "start it: it mounts for the users whom [mount] users names"
        yield problem("the service that mounts for users does not run", remedy_, _start(scene))
        return
    if scene.uid == 0:
        yield ok(f"users may mount: {', '.join(allowed.users)}")
        return
    try:
        check_allowed(scene.uid, allowed)
    except Denied as denied:
        yield note(f"you may not mount: {denied}")
    else:
        yield ok("you may mount eCryptfs folders: `upcall mount`")


def _listens(path: Path) -> bool:
    try:
        return listens(path)
    except OSError:
        return False


def _start(scene: Scene) -> str:
    service = scene.service_command("restart", UNIT) if scene.folder is None else ""
    return service or f"upcall mounts serve{scene.runtime_option()} &"


def _stop(scene: Scene) -> str:
    return f"systemctl stop {UNIT}" if scene.has_unit("system", UNIT) else ""
