"""`upcall daemon` becomes this process: without the command line's libraries it starts and stays small."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from upcall.daemon.control import Control
from upcall.daemon.keyservice import KeyService
from upcall.daemon.loading import loaders
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.sources import fetch
from upcall.errors import UpcallError
from upcall.kernel import keyring
from upcall.kernel.process import harden
from upcall.log import EventLog
from upcall.runtime import daemon_socket, find_place
from upcall.wire.ecryptfs import is_signature

_WARMING = 4.0  # seconds that registering waits for keys to be opened


def run(arguments: list[str]) -> int:
    """`folder=PATH`, `prove=all`, and one `module=ALIAS=PACKAGE:NAME` for each key module that may be loaded;
    `isolated` instead of `module` for one that gets a process of its own. How people are asked for PINs:
    `ask=WAY,...`, `pinentry=PATH`, `pin-time=SECONDS`, `prompt-time=SECONDS`."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder = settings.get("folder")
    harden()
    log = EventLog("upcall-daemon")
    modules = loaders(arguments, lambda: keys.asker().deadline, log)
    try:
        keyring.join_session_and_link_user_keyring()
        prompter = LazyPrompter(arguments, log)
        keys = KeyService(keyring, modules, fetch, settings.get("prove") == "all", prompter)
        control = Control(daemon_socket(), keys)
        # Whoever is registered is asked. Importing a key module can cost a busy machine more than the kernel's 3 s,
        # and an older daemon, which has its keys open, serves meanwhile.
        warming = threading.Thread(target=_warm, args=(keys,), name="warm", daemon=True)
        warming.start()
        warming.join(_WARMING)
        try:
            serve(Daemon(find_place(Path(folder) if folder else None), [keys], control, log))
        finally:
            control.close()
    except (UpcallError, OSError) as error:
        print(f"upcall daemon: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_UNAVAILABLE
    return os.EX_OK


def _warm(keys: KeyService) -> None:
    """The keys whose auth tokens are there already."""
    signatures = (key.description for key in keyring.list_user_keyring() if key.type == "user")
    keys.warm(filter(is_signature, signatures))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
