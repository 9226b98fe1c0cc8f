"""`python -m upcall.testing.daemon`: runs a daemon whose keyring is a folder."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from upcall.core.errors import ModuleFailed
from upcall.daemon.control import Control
from upcall.daemon.loading import LazyHandler, loaders
from upcall.daemon.passphrase_sources import fetch
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.reload import Renewing
from upcall.handler import Handler
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden
from upcall.observe.recorder import recorder
from upcall.process.hardening import done_listening, of_daemon
from upcall.process.log import EventLog
from upcall.process.paths import daemon_socket, find_place, user_folder
from upcall.process.reload import Hangup
from upcall.protocols.ecryptfs.auto_lock import Locking
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.testing.keys import FolderKeyring


def run(arguments: list[str]) -> None:
    """Runs the daemon. Arguments, each NAME=VALUE:

    `folder=PATH`, `keys=PATH`, `control=yes`; repeatedly `handler=PACKAGE:NAME`, `module=` or
    `isolated=ALIAS=PACKAGE:NAME`, and `lazy=SERVICE=PACKAGE:NAME` for a handler that is loaded on its first request;
    `records=`, `hardening=`, `writable=`, `ask=`, `pinentry=`, `pin-time=`, `prompt-time=`, `lock-after=` and
    `lock-on=` as of upcall.daemon. `found=PATH`: a file with a JSON list of arguments, which is read at SIGHUP.
    """
    hangup = Hangup()
    harden()
    settings = dict(argument.split("=", 1) for argument in arguments)
    handlers = [_handler(one.removeprefix("handler=")) for one in arguments if one.startswith("handler=")]
    handlers += [LazyHandler(*one.split("=", 2)[1:]) for one in arguments if one.startswith("lazy=")]
    hardened = of_daemon(arguments, user_folder())
    log, manager = EventLog("upcall-daemon"), Manager()
    log("privileges-dropped", **hardened._asdict())
    modules = loaders(arguments, lambda: keys.deadline(), log)
    prompter = LazyPrompter(arguments, log)
    keys = KeyHandler(FolderKeyring(Path(settings["keys"])), modules, fetch, prompter=prompter)
    control = None
    if "control" in settings:
        control = Control(daemon_socket(), keys.cache, keys.warm, prompter.attach)
    if control is not None:
        done_listening(hardened)
    record = recorder("upcall-daemon", settings.get("records", "no"), log)
    daemon = Daemon(find_place(Path(settings["folder"])), [keys, *handlers], control, log, manager, record)
    locking = Locking(keys.cache, arguments, log)
    daemon.on_reload = Renewing(
        arguments, keys, daemon, log, lambda _: _found(Path(settings["found"])), locking=locking
    ).ask
    if control is not None:
        control.on_reload = daemon.on_reload
        control.more = lambda: {"hardening": hardened._asdict(), "locking": locking.report()}
    try:
        serve(daemon, hangup)
    finally:
        if control is not None:
            control.close()


def _found(file: Path) -> list[str]:
    try:
        found: list[str] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModuleFailed(f"{file}:1: is no JSON") from error
    return found


def _handler(spec: str) -> Handler:
    package, _, name = spec.partition(":")
    found: Handler = getattr(importlib.import_module(package), name)
    return found


if __name__ == "__main__":
    run(sys.argv[1:])
