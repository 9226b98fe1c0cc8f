"""`python -m upcall.testing.daemon`: a daemon whose keyring is a folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from upcall.daemon.control import Control
from upcall.daemon.keyservice import KeyService
from upcall.daemon.loading import loaders
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.sources import fetch
from upcall.handler import Handler
from upcall.log import EventLog
from upcall.runtime import daemon_socket, find_place
from upcall.testing.keys import FolderKeyring


def run(arguments: list[str]) -> None:
    """`folder=PATH`, `keys=PATH`, `control=yes`; repeatedly `handler=PACKAGE:NAME`, and `module=` or
    `isolated=ALIAS=PACKAGE:NAME`; `ask=`, `pinentry=`, `pin-time=` and `prompt-time=` as of upcall.daemon."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    handlers = [_handler(one.removeprefix("handler=")) for one in arguments if one.startswith("handler=")]
    log = EventLog("upcall-daemon")
    modules = loaders(arguments, lambda: keys.asker().deadline, log)
    prompter = LazyPrompter(arguments, log)
    keys = KeyService(FolderKeyring(Path(settings["keys"])), modules, fetch, prompter=prompter)
    control = Control(daemon_socket(), keys) if "control" in settings else None
    try:
        serve(Daemon(find_place(Path(settings["folder"])), [keys, *handlers], control, log))
    finally:
        if control is not None:
            control.close()


def _handler(spec: str) -> Handler:
    package, _, name = spec.partition(":")
    found: Handler = getattr(importlib.import_module(package), name)
    return found


if __name__ == "__main__":
    run(sys.argv[1:])
