"""`python -m upcall.testing.daemon`: a daemon whose keyring is a folder."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

from upcall.daemon.control import Control
from upcall.daemon.keyservice import KeyService
from upcall.daemon.process import Daemon, serve
from upcall.daemon.sources import fetch
from upcall.modules import load
from upcall.runtime import daemon_socket, find_place
from upcall.testing.keys import FolderKeyring


def run(arguments: list[str]) -> None:
    """`folder=PATH`, `keys=PATH`, `control=yes`; any number of `module=ALIAS=PACKAGE:NAME`, `handler=PACKAGE:NAME`."""
    modules, settings, handlers = {}, {}, []
    for key, value in (argument.split("=", 1) for argument in arguments):
        if key == "module":
            alias, spec = value.split("=", 1)
            modules[alias] = functools.partial(load, spec)
        elif key == "handler":
            package, _, name = value.partition(":")
            handlers.append(getattr(importlib.import_module(package), name))
        else:
            settings[key] = value
    keys = KeyService(FolderKeyring(Path(settings["keys"])), modules, fetch)
    control = Control(daemon_socket(), keys) if "control" in settings else None
    try:
        serve(Daemon(find_place(Path(settings["folder"])), [keys, *handlers], control))
    finally:
        if control is not None:
            control.close()


if __name__ == "__main__":
    run(sys.argv[1:])
