"""This user's daemon: whether it runs, answers, and is registered with the broker."""

from __future__ import annotations

from collections.abc import Iterator

from upcall import __version__
from upcall.doctor.findings import Finding, ok, problem
from upcall.doctor.scene import Scene, state_of

UNIT, SYSTEM_UNIT = "upcall-daemon.service", "upcall-system-daemon.service"  # the latter is uid 0's


def start_command(scene: Scene) -> str:
    if scene.folder is None:
        if scene.uid == 0 and scene.has_unit("system", SYSTEM_UNIT):
            return f"systemctl restart {SYSTEM_UNIT}"
        if scene.uid != 0 and scene.has_unit("user", UNIT):
            return f"systemctl --user restart {UNIT}"
    return f"upcall daemon{scene.runtime_option()} &"  # which takes over from an older one


def running(scene: Scene) -> Iterator[Finding]:
    """There, awake, answering, of this version. Whether it is registered is `registered`'s affair."""
    said = scene.daemon
    if not said.pid:
        yield problem(f"uid {scene.uid} has no daemon: {said.why}", "start it", start_command(scene))
    elif state_of(said.pid) in ("T", "t"):
        yield problem(f"the daemon (pid {said.pid}) is stopped", "let it go on", f"kill -CONT {said.pid}")
    elif said.status is None:
        what = f"the daemon (pid {said.pid}) does not answer: {said.why}"
        yield problem(what, "a new one takes over from it", start_command(scene))
    elif said.status.get("version") != __version__:
        version = said.status.get("version") or "unknown"
        what = f"the daemon (pid {said.pid}) is of version {version}, this is {__version__}"
        yield problem(what, "a new one takes over from it", start_command(scene))
    else:
        yield ok(f"the daemon (pid {said.pid}) answers")


def registered(scene: Scene) -> Iterator[Finding]:
    """Of all processes of this uid, the broker asks the one that is registered."""
    status, said = scene.broker.status, scene.daemon
    if status is None:
        return
    mine = [one for one in status["daemons"] if one["uid"] == scene.uid]
    if not mine:
        if said.pid and state_of(said.pid) not in ("T", "t"):
            what = f"the daemon (pid {said.pid}) is not registered with this broker: it may look for one elsewhere"
            yield problem(what, "a new one takes over from it", start_command(scene))
        return
    pid = mine[0]["pid"]
    if state_of(pid) in ("T", "t") and pid != said.pid:
        yield problem(f"the daemon that is registered (pid {pid}) is stopped", "let it go on", f"kill -CONT {pid}")
    elif said.pid and said.pid != pid:
        what = f"pid {pid} is registered, and another daemon (pid {said.pid}) takes this user's commands"
        yield problem(what, "a new one takes over from both", start_command(scene))
    else:
        yield ok(f"the broker asks the daemon with pid {pid}")
