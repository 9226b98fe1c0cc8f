"""Checks this user's daemon: that it runs, answers, and is registered with the broker."""

from __future__ import annotations

from collections.abc import Iterator

from upcall import __version__
from upcall.kernel import procfs
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.process import machine

UNIT, ROOT_UNIT = "upcall-daemon.service", "upcall-root-daemon.service"  # of users, and of root


def start_command(scene: Scene) -> str:
    """Returns the command that starts or restarts this user's daemon."""
    if scene.folder is None:
        if scene.uid == 0 and scene.has_unit("system", ROOT_UNIT) and not scene.init_script():
            return f"systemctl restart {ROOT_UNIT}"
        if scene.uid != 0 and scene.has_unit("user", UNIT) and not scene.init_script():
            return f"systemctl --user restart {UNIT}"
    return f"upcall daemon{scene.runtime_option()} &"  # replaces an older one


def running(scene: Scene) -> Iterator[Finding]:
    """Checks that the daemon runs, is not stopped, answers, and has this version."""
    said = scene.daemon
    if not said.pid and scene.uid == machine.ROOT != machine.uid():
        yield note("root has no daemon: only root's own keys would need one", "start it", start_command(scene))
    elif not said.pid:
        yield problem(f"uid {scene.uid} has no daemon: {said.why}", "start it", start_command(scene))
    elif procfs.state(said.pid) in ("T", "t"):
        yield problem(f"the daemon (pid {said.pid}) is stopped", "continue it", f"kill -CONT {said.pid}")
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
    """Checks that the registered process is this user's daemon, and is not stopped."""
    status, said = scene.broker.status, scene.daemon
    if status is None:
        return
    mine = [one for one in status["daemons"] if one["uid"] == scene.uid]
    if not mine:
        if said.pid and procfs.state(said.pid) not in ("T", "t"):
            what = f"the daemon (pid {said.pid}) is not registered with this broker: it may look for one elsewhere"
            yield problem(what, "a new one takes over from it", start_command(scene))
        return
    pid = mine[0]["pid"]
    if procfs.state(pid) in ("T", "t") and pid != said.pid:
        yield problem(f"the daemon that is registered (pid {pid}) is stopped", "continue it", f"kill -CONT {pid}")
    elif said.pid and said.pid != pid:
        what = f"pid {pid} is registered, and another daemon (pid {said.pid}) takes this user's commands"
        yield problem(what, "a new one takes over from both", start_command(scene))
    else:
        yield ok(f"the broker asks the daemon with pid {pid}")


def machines(scene: Scene) -> Iterator[Finding]:
    """Checks that the machine's daemon runs, and its user."""
    status = scene.broker.status
    if status is None or status["broker"]["uid"] != machine.ROOT or scene.uid != machine.ROOT:
        return  # only root gets this part of the status
    uid = status["broker"].get("machine", machine.ROOT)
    pids = [one["pid"] for one in status["daemons"] if one["uid"] == uid]
    if uid != machine.uid():
        what = f"the broker takes the machine's daemon to be of uid {uid}, and it is of uid {machine.uid()}"
        yield problem(
            what, "have the broker read its configuration", scene.service_command("reload", "upcall-broker.service")
        )
    elif uid == machine.ROOT:
        what = "root's daemon parses what KDCs, name servers and mail servers send: there is no system user upcall"
        yield note(what, "`upcall setup` makes one, and has the machine's daemon run as it")
    elif not pids:
        what = f"the machine has no daemon (uid {uid}): root's mounts and the kernel's name look-ups fail"
        yield problem(what, "start it", scene.service_command("restart", machine.UNIT))
    else:
        yield ok(f"the machine's daemon (pid {pids[0]}) runs as uid {uid}")
        yield from _keytab(scene)


def _keytab(scene: Scene) -> Iterator[Finding]:
    """Checks that the machine's daemon has the current keytab. It cannot use root's own tickets."""
    folder = machine.credentials(scene.at("/"))
    if folder is None:
        return
    try:
        ours = scene.at("/etc/krb5.keytab").read_bytes()
    except OSError:
        yield note(
            "there is no /etc/krb5.keytab: root's mounts with sec=krb5 find no ticket, whatever root's kinit got"
        )
        return
    try:
        same = (folder / machine.KEYTAB).read_bytes() == ours
    except OSError:
        same = False
    if not same:
        what = "the machine's daemon has an older copy of /etc/krb5.keytab"
        yield problem(what, "hand it over again", scene.service_command("restart", machine.UNIT))
