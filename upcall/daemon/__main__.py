"""`upcall daemon` becomes this process: without the command line's libraries it starts and stays small."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from upcall.config import ConfigError
from upcall.core.errors import UpcallError
from upcall.daemon.control import Control
from upcall.daemon.loading import handlers, loaders
from upcall.daemon.passphrase_sources import fetch
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.reload import Renewing
from upcall.kernel import keyring
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden
from upcall.process import trust
from upcall.process.hardening import done_listening, of_daemon
from upcall.process.log import EventLog
from upcall.process.paths import Place, daemon_socket, find_place, user_folder
from upcall.process.reload import Hangup
from upcall.protocols.ecryptfs import own_files as ownfiles
from upcall.protocols.ecryptfs.auto_lock import Locking
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.protocols.ecryptfs.packets import is_signature

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder

REPLACED = os.EX_TEMPFAIL  # the exit status that tells a service manager to leave it at that
_WARMING = 4.0  # seconds that registering waits for keys to be opened


def run(arguments: list[str]) -> int:
    """`folder=PATH`, `prove=all`, and one `module=ALIAS=PACKAGE:NAME` for each key module that may be loaded;
    `isolated` instead of `module` for one that gets a process of its own; one `handler=SERVICE=PACKAGE:NAME` for each
    service that somebody answers; and what upcall.daemon.plugin_discovery is to be told when it looks again.
    `records=WHERE` (upcall/observe/recorder.py); `hardening=no`, `writable=PATH` (upcall/process/hardening.py). How
    people are asked for PINs: `ask=WAY,...`, `pinentry=PATH`, `pin-time=SECONDS`, `prompt-time=SECONDS`.
    When keys lock by themselves: `lock-after=SECONDS`, `lock-on=CAUSE,...` (protocols/ecryptfs/auto_lock.py). What
    became of the keys that were to be added at login: `added=`, `not-added=` (protocols/ecryptfs/auto_add.py)."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder = settings.get("folder")
    try:
        faults = trust.require()
    except ConfigError as error:
        print(f"upcall daemon: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_CONFIG
    hangup = Hangup()
    manager = Manager()
    harden()
    hardened = of_daemon(arguments, _own_folder())  # before there is another thread
    log = EventLog("upcall-daemon")
    log("privileges-dropped", **hardened._asdict())
    for fault in faults:
        log("file-not-trusted", file=fault.path, why=fault.why)
    if settings.get("network") == "no":
        log("network-refused", why="root's daemon serves root's keys only: the machine's has a user of its own")
    elif os.geteuid() == 0:
        log("network-served", why="as root, for there is no system user upcall: `upcall setup` makes one")
    modules = loaders(arguments, lambda: keys.deadline(), log)
    try:
        keyring.join_session_and_link_user_keyring()
        ownfiles.refuse(keyring, log)
        prompter = LazyPrompter(arguments, log)
        keys = KeyHandler(keyring, modules, fetch, settings.get("prove") == "all", prompter)
        control = Control(daemon_socket(), keys.cache, keys.warm, prompter.attach)
        done_listening(hardened)  # before there is anybody else's code
        # Whoever is registered is asked. Importing a key module can cost a busy machine more than the kernel's 3 s,
        # and an older daemon, which has its keys open, serves meanwhile.
        warming = threading.Thread(target=_warm, args=(keys,), name="warm", daemon=True)
        warming.start()
        warming.join(_WARMING)
        locking, not_added = Locking(keys.cache, arguments, log), _tell_of_keys(arguments, log)
        control.more = lambda: {
            "hardening": hardened._asdict(), "locking": locking.report(), "not_added": not_added,
        }  # fmt: skip
        record = _recorder(settings.get("records", "no"), log)
        place = find_place(Path(folder) if folder else None)
        try:
            daemon = Daemon(place, [keys, *handlers(arguments)], control, log, manager, record)
            control.on_reload = daemon.on_reload = Renewing(arguments, keys, daemon, log, locking=locking).ask
            serve(daemon, hangup)
            if daemon.replaced and _another_is_registered(place):
                return REPLACED
        finally:
            control.close()
    except (UpcallError, OSError) as error:
        print(f"upcall daemon: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_UNAVAILABLE
    return os.EX_OK


def _another_is_registered(place: Place) -> bool:
    """Whether a newer daemon serves this user, in the broker's own words: only then is this one to stay away. An end
    that was forced otherwise is one from which the service manager starts us again."""
    from upcall.process.connection import BrokerConnection  # only who is replaced pays for it

    try:
        with BrokerConnection(place.folder) as client:
            daemons = client.status()["daemons"]
    except (UpcallError, OSError, ValueError, KeyError):
        return False
    return any(one["uid"] == os.geteuid() and one["pid"] != os.getpid() for one in daemons)


def _own_folder() -> Path | None:
    """None if it is not sound, which `daemon_socket` complains of."""
    try:
        return user_folder()
    except (UpcallError, OSError):
        return None


def _recorder(where: str, log: EventLog) -> Recorder | None:
    if where == "no":
        return None
    from upcall.observe.recorder import recorder  # only who wants records pays for them

    return recorder("upcall-daemon", where, log)


def _tell_of_keys(arguments: list[str], log: EventLog) -> list[dict[str, str]]:
    """What became of the keys that were to be added; those that could not be, for the status."""
    failed = []
    for kind, first, second in (one.split("=", 2) for one in arguments if one.startswith(("added=", "not-added="))):
        if kind == "added":
            log("key-added", name=second, signature=first)
        else:
            log("key-add-failed", file=first, why=second)
            failed.append({"file": first, "why": second})
    return failed


def _warm(keys: KeyHandler) -> None:
    """The keys whose auth tokens are there already."""
    signatures = (key.description for key in keyring.list_user_keyring() if key.type == "user")
    keys.warm(filter(is_signature, signatures), ahead=True)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
