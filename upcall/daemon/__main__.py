"""Runs the daemon: `python -m upcall.daemon SETTINGS`, with DaemonSettings as upcall/process/settings.py packs them.

`upcall daemon` becomes this process by exec: without the command line's libraries it starts fast and stays small.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upcall.core.errors import UpcallError
from upcall.daemon.control import Control
from upcall.daemon.loading import handlers, loaders
from upcall.daemon.passphrase_sources import fetch
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.reload import Renewing
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import keyring
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, share_heap
from upcall.process import entry
from upcall.process.hardening import done_listening, of_daemon
from upcall.process.log import EventLog
from upcall.process.paths import Place, daemon_socket, find_place, user_folder
from upcall.process.reload import Hangup
from upcall.process.trust import Fault, log_faults
from upcall.protocols.ecryptfs import own_files as ownfiles
from upcall.protocols.ecryptfs.auto_lock import Locking
from upcall.protocols.ecryptfs.auto_mount import AutoMount
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.protocols.ecryptfs.packets import is_signature
from upcall.protocols.ecryptfs.settings import LoginKeys

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder

REPLACED = os.EX_TEMPFAIL  # the exit status that tells a service manager to leave it at that
_WARMING = 4.0  # seconds that registering waits for keys to be opened


def serve_with(settings: DaemonSettings, faults: Sequence[Fault] = ()) -> int:
    """Runs a daemon in this process until it is told to end. `faults`: of trust, for the log. Returns the exit status.
    UpcallError, OSError. In the main thread, before there is another: privileges are dropped per thread."""
    hangup = Hangup()
    manager = Manager()
    harden()
    share_heap()
    hardened = of_daemon(settings.hardening, settings.records, _own_folder())
    log = EventLog("upcall-daemon")
    log("privileges-dropped", **hardened._asdict())
    log_faults(faults, log)
    if not settings.hardening.network:
        log("network-refused", why="root's daemon serves root's keys only: the machine's has a user of its own")
    elif os.geteuid() == 0:
        log("network-served", why="as root, for there is no system user upcall: `upcall setup` makes one")
    modules = loaders(settings.plugins.modules, lambda: keys.deadline(), log)
    keyring.join_session_and_link_user_keyring()
    ownfiles.refuse(keyring, log)
    prompter = LazyPrompter(settings.prompting, log, settings.locking.after)
    keys = KeyHandler(keyring, modules, fetch, settings.prove_all, prompter)
    control = Control(daemon_socket(), keys.cache, keys.warm, prompter.attach)
    done_listening(hardened)  # before code of plugins runs
    # A registered daemon gets requests. Importing a key module can cost a busy machine more than the kernel's 3 s, and
    # an older daemon, which has its keys open, serves meanwhile.
    warming = threading.Thread(target=_warm, args=(keys,), name="warm", daemon=True)
    warming.start()
    warming.join(_WARMING)
    mounting = AutoMount(settings.mounts, log)
    locking = Locking(keys.cache, settings.locking, log, mounting.on_event)
    not_added = _log_keys(settings.keys, log)
    mounting.at_login()
    control.more = lambda: {
        "hardening": hardened._asdict(), "locking": locking.report(), "not_added": not_added,
    }  # fmt: skip
    record = _recorder(settings.records, log)
    find = partial(find_place, settings.folder)
    try:
        serving = [keys, *handlers(settings.plugins.handlers)]
        daemon = Daemon(find(), serving, control, log, manager, record, find)
        daemon.tracebacks = settings.traceback
        renewing = Renewing(settings.plugins, keys, daemon, log, locking=locking)
        control.on_reload, daemon.on_reload = renewing.ask, renewing.on_hangup
        serve(daemon, hangup)
        if daemon.replaced and _another_is_registered(daemon.place):
            return REPLACED
    finally:
        control.close()
    return os.EX_OK


def _another_is_registered(place: Place) -> bool:
    """Returns whether the broker has another daemon of this user: only then must this one not be restarted by the
    service manager."""
    from upcall.process.connection import BrokerConnection  # needed by replaced daemons only

    try:
        with BrokerConnection(place.folder) as client:
            daemons = client.status()["daemons"]
    except (UpcallError, OSError, ValueError, KeyError):
        return False
    return any(one["uid"] == os.geteuid() and one["pid"] != os.getpid() for one in daemons)


def _own_folder() -> Path | None:
    """Returns this user's runtime folder; None if it is unusable, for which `daemon_socket` raises an error."""
    try:
        return user_folder()
    except (UpcallError, OSError):
        return None


def _recorder(where: str, log: EventLog) -> Recorder | None:
    if where == "no":
        return None
    from upcall.observe.recorder import recorder  # needed for records only

    return recorder("upcall-daemon", where, log)


def _log_keys(keys: LoginKeys, log: EventLog) -> list[dict[str, str]]:
    """Logs what became of the keys that were to be added at login. Returns those that could not be, for the status."""
    for added in keys.added:
        log("key-added", name=added.name, signature=added.signature)
    failed = [{"file": str(keys.folder / key.file), "why": key.why} for key in keys.failed]
    for key in failed:
        log("key-add-failed", **key)
    return failed


def _warm(keys: KeyHandler) -> None:
    """Opens the keys whose auth tokens are in the user keyring."""
    signatures = (key.description for key in keyring.list_user_keyring() if key.type == "user")
    keys.warm(filter(is_signature, signatures), ahead=True)


if __name__ == "__main__":
    sys.exit(entry.run("upcall daemon", DaemonSettings, sys.argv[1:], serve_with))
